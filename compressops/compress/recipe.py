"""Recipes: a list of stages, written in Python or YAML with the same names."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from compressops.compress.attention import QuantizeAttention
from compressops.compress.encode import Encode
from compressops.compress.equalize import Equalize
from compressops.compress.lowrank import Factorize
from compressops.compress.prune import Prune
from compressops.compress.quantize import Quantize
from compressops.compress.retrain import Retrain
from compressops.compress.round import Round
from compressops.compress.stage import Stage
from compressops.distill.losses import DistillLoss
from compressops.formats.coding import Coding
from compressops.formats.number import Number
from compressops.formats.registry import Axis
from compressops.registry import why_not
from compressops.zoo.registry import build_data, build_model

VERSION = 1
STAGES: dict[str, type[Stage]] = {
    stage.__name__: stage
    for stage in (Encode, Equalize, Factorize, Prune, Quantize, QuantizeAttention, Retrain, Round)
}
# The fields whose value is a member of an axis, {TypeName: {field: …}} in YAML.
_AXES: dict[str, type[Axis]] = {
    "number": Number,
    "activations": Number,
    "coding": Coding,
    "distill": DistillLoss,
}


@dataclass(frozen=True)
class Recipe:
    """What to do to a model, stage by stage.

    Args:
        stages: `Factorize`, `Prune`, `Equalize`, `Quantize`, `QuantizeAttention`, `Retrain`,
            `Round`, `Encode`, in order.
        version: of the recipe's form; 1.
        model, data: names from the zoo with their arguments, as ``{"CifarNet": {…}}``, so that a
            file says all that its run needs; ``None`` where the caller brings them.
        teacher: a zoo model for `Retrain`'s ``distill``, or ``"model"``: the model before stage 1.
        folder: what relative paths in ``model`` and ``data`` are relative to.

    Raises:
        ValueError: no stages, an unknown version, or a stage that is none.
    """

    stages: tuple[Stage, ...]
    version: int = VERSION
    model: dict[str, dict] | None = None
    data: dict[str, dict] | None = None
    teacher: dict[str, dict] | str | None = None
    folder: Path | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        # True equals 1.
        if isinstance(self.version, bool) or self.version != VERSION:
            raise ValueError(f"version must be {VERSION}, got {self.version!r}")
        if not isinstance(self.stages, (tuple, list)) or not self.stages:
            raise ValueError(f"stages must be a list of at least one stage, got {self.stages!r}")
        for i, stage in enumerate(self.stages, 1):
            if not isinstance(stage, Stage):
                raise ValueError(f"stage {i} must be one of {', '.join(STAGES)}, got {stage!r}")
        object.__setattr__(self, "stages", tuple(self.stages))

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a path, or from YAML text (anything with a line break).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not YAML, a key that is unknown or double, or a value that is wrong; the
                message names key, value and place.
        """
        folder = None
        if isinstance(source, str) and not source.strip():
            raise ValueError(f"source must be a path or YAML text, got {source!r}")
        if isinstance(source, os.PathLike) or "\n" not in source:
            path = Path(source)
            where, text, folder = str(path), path.read_text(), path.parent.resolve()
        else:
            where, text = "recipe", source
        try:
            tree = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{where}: not valid YAML: {error}") from None
        allowed = ("version", "model", "data", "teacher", "stages")
        tree = _mapping(tree, where)
        _check_keys(tree, allowed, where)
        if not isinstance(tree.get("stages"), list):
            raise ValueError(f"{where}: stages must be a list, got {tree.get('stages')!r}")
        stages = [_stage(item, f"{where}: stage {i}") for i, item in enumerate(tree["stages"], 1)]
        try:
            return cls(**{**tree, "stages": tuple(stages)}, folder=folder)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The recipe as YAML text, which is also written to ``path`` if one is given."""
        tree: dict[str, Any] = {"version": self.version}
        for key in ("model", "data", "teacher"):
            if getattr(self, key) is not None:
                tree[key] = getattr(self, key)
        tree["stages"] = [{type(s).__name__: stage_fields(s)} for s in self.stages]
        text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)
        if path is not None:
            Path(path).write_text(text)
        return text

    def load(self) -> tuple[nn.Module, Any, Any, nn.Module | None]:
        """``(model, train_data, eval_data, teacher)`` that the recipe names.

        Raises:
            ValueError: the recipe names no model or data, or one that the zoo does not have.
            FileNotFoundError: a checkpoint is missing, or the data cannot be had.
        """
        for key in ("model", "data"):
            if getattr(self, key) is None:
                raise ValueError(f"the recipe names no {key}; add '{key}: {{Name: {{…}}}}'")
        model = build_model(self.model, self.folder)
        teacher = self.teacher
        if teacher is not None:
            teacher = model if teacher == "model" else build_model(teacher, self.folder)
        return model, *build_data(self.data, self.folder), teacher

    def validate(self, model: nn.Module, *, train_data: Any, eval_data: Any, teacher: Any) -> None:
        """Check everything that can be checked before any work is done.

        Every stage is tried on a copy of ``model`` without its data.

        Raises:
            ValueError: names the stage, the argument and the value.
        """
        precisions = {s.mixed_precision for s in self.stages if isinstance(s, Retrain)}
        if len(precisions) > 1:
            raise ValueError(f"all Retrain stages must share one mixed_precision, got {precisions}")
        for name, module in model.named_modules():
            computed = vars(module).get("weight")
            if isinstance(computed, Tensor) and not computed.is_leaf:
                raise ValueError(
                    f"layer {name!r}: {why_not(module)}, so the model cannot be copied; make it "
                    f"permanent with remove_weight_norm or torch.nn.utils.prune.remove"
                )
        trial = copy.deepcopy(model)
        for i, stage in enumerate(self.stages, 1):
            where = f"stage {i} ({type(stage).__name__})"
            if isinstance(stage, Retrain):
                if train_data is None:
                    raise ValueError(f"{where} needs train_data")
                if stage.distill and teacher is None:
                    raise ValueError(f"{where} distils, which needs a teacher")
            if stage.observes and train_data is None:
                raise ValueError(f"{where}: ranges='running' needs train_data to find ranges")
            if isinstance(stage, Factorize) and stage.calibration and train_data is None:
                raise ValueError(f"{where}: calibration={stage.calibration} needs train_data")
            try:
                stage.validate(trial, self.stages[i:])
                stage.attach(trial)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: {error}") from error


def stage_fields(stage: Stage) -> dict[str, Any]:
    """The fields that are not the defaults, in YAML's form."""
    fields = {}
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if value != field.default:
            fields[field.name] = _plain(value)
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, Axis):
        spec = value.to_spec()
        return {spec.pop("type"): spec}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _stage(item: Any, where: str) -> Stage:
    name, fields = _typed(item, where, STAGES)
    cls = STAGES[name]
    where = f"{where} ({name})"
    allowed = [field.name for field in dataclasses.fields(cls)]
    axis = _AXES.get(cls.main_field or "")
    if not isinstance(fields, dict) and cls.main_field:
        fields = {cls.main_field: fields}
    fields = dict(_mapping(fields, where))
    for key in list(fields):
        # Quantize: {DynamicFixedPoint: {bits: 6}} is short for number: {DynamicFixedPoint: …}.
        if axis is not None and key in axis.members and key not in allowed:
            fields[cls.main_field] = {key: fields.pop(key)}
    _check_keys(fields, allowed, where)
    for key, value in fields.items():
        if key in _AXES and value is not None:
            fields[key] = _members(value, f"{where}: {key}", _AXES[key])
        elif isinstance(value, list):
            fields[key] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _members(value: Any, where: str, axis: type[Axis]) -> Any:
    if isinstance(value, list):
        return tuple(_members(item, where, axis) for item in value)
    name, fields = _typed(value, where, axis.members)
    try:
        return axis.from_spec({**_mapping(fields or {}, f"{where} ({name})"), "type": name})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} ({name}): {error}") from None


def _typed(item: Any, where: str, known: Any) -> tuple[str, Any]:
    """The name and the arguments of ``{Name: arguments}`` or a bare ``Name``."""
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise ValueError(f"{where} must be one name with its arguments, got {item!r}")
    ((name, fields),) = item.items()
    if name not in known:
        raise ValueError(f"{where}: unknown {name!r}; known are {', '.join(sorted(known))}")
    return name, {} if fields is None else fields


def _mapping(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping of names to values, got {value!r}")
    return value


def _check_keys(fields: dict, allowed: Sequence[str], where: str) -> None:
    for key in fields:
        if key not in allowed:
            raise ValueError(f"{where}: unknown key {key!r}; allowed are {', '.join(allowed)}")


class _Loader(yaml.SafeLoader):
    """YAML without double keys, and with 1e-3 read as the number that it is in YAML 1.2."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a name, not a list or mapping", key.start_mark
            )
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key.value!r} is given twice", key.start_mark
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+0123456789."),
)
