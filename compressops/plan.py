"""What `convert` is asked to do with each layer: its record, completed by the config; and its
packed weight."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from compressops import ops
from compressops.formats import (
    Coding,
    Dense,
    Float,
    Int,
    Layout,
    LowRank,
    Number,
    PackedTensor,
    Raw,
)
from compressops.nn import PackedModule

Config = Layout | Number | Coding | tuple | None


@dataclass(frozen=True)
class Choice:
    """What a config says about one layer; ``None`` on an axis that it does not name."""

    layout: Layout | None = None
    number: Number | None = None
    coding: Coding | None = None
    leave: bool = False

    def __bool__(self) -> bool:
        return any(axis is not None for axis in (self.layout, self.number, self.coding))


@dataclass(frozen=True)
class Plan:
    """How a layer's weight is to be packed.

    Attributes:
        layout, number, coding: the choice on each axis.
        params: the number's parameters as recorded; ``None`` fits them to the weight.
        mask: bool, of the weight's shape: the entries that pruning kept; ``None``: all.
        post_training: the number (or a low rank) comes from the config: the weight changes now.
        asked: the number comes from the config, though the weight may have it already.
        recorded: the layer was compressed, and its parametrizations are the record.
        shared: the weight also belongs to a layer of another type.
        shape: of the weight.
        groups: of a convolution.
        factors: of a layer that was factorized: the module that holds each, and its plan.
        rows: the integers in which training wrote each row of the layer's input, if it did.
        weight: what is packed in place of the layer's own weight: float32, on the grid of
            ``params``; ``None``: its own.
    """

    layout: Layout
    number: Number
    coding: Coding
    params: dict[str, Tensor] | None = None
    mask: Tensor | None = None
    post_training: bool = False
    asked: bool = False
    recorded: bool = False
    shared: bool = False
    shape: tuple[int, ...] = ()
    groups: int = 1
    factors: tuple[tuple[Any, Plan], ...] = ()
    weight: Tensor | None = None
    rows: Int | None = None


def resolve(config: Config | Mapping[str, Config], layers: Mapping[str, Any]) -> dict[str, Choice]:
    """The choice for each of ``layers`` (by name).

    Raises:
        TypeError: ``config`` is not a layout, number, coding, tuple of these, or mapping.
        ValueError: a glob matches none of the layers, or a tuple names an axis twice.
    """
    if not isinstance(config, Mapping):
        return dict.fromkeys(layers, _choice(config, leave=False))
    by_glob = {glob: _choice(value, leave=value is None) for glob, value in config.items()}
    for glob in by_glob:
        if not any(fnmatch.fnmatchcase(name, glob) for name in layers):
            names = ", ".join(list(layers)[:8]) + (", …" if len(layers) > 8 else "")
            raise ValueError(f"config: {glob!r} matches no layer; there are: {names or 'none'}")
    return {
        name: next(
            (choice for glob, choice in by_glob.items() if fnmatch.fnmatchcase(name, glob)),
            Choice(),
        )
        for name in layers
    }


def _choice(config: Config, leave: bool) -> Choice:
    if config is None:
        return Choice(leave=leave)
    axes: dict[str, Any] = {}
    for value in config if isinstance(config, tuple) else (config,):
        for name, kind in (("layout", Layout), ("number", Number), ("coding", Coding)):
            if isinstance(value, kind):
                if name in axes:
                    raise ValueError(f"config: {config} names a {name} twice")
                axes[name] = value
                break
        else:
            hint = " (an instance is needed)" if isinstance(value, type) else ""
            raise TypeError(
                f"config must be made of a layout, a number and a coding, got {value!r}{hint}"
            )
    return Choice(**axes)


def plan(module: nn.Module, record: Any, choice: Choice) -> Plan:
    """The plan of a float layer from its `compress.record` (or ``None``) and its choice.

    Raises:
        ValueError: the layer is recorded with a number, and the config asks for another.
    """
    if record is not None and record.factors:
        return _plan_of_factors(module, record, choice)
    shape, low_rank = tuple(module.weight.shape), isinstance(choice.layout, LowRank)
    groups = getattr(module, "groups", 1)
    if record is None:
        plain = Float(str(module.weight.dtype).removeprefix("torch."))
        return Plan(
            choice.layout or Dense(),
            choice.number or plain,
            choice.coding or Raw(),
            post_training=choice.number is not None or low_rank,
            asked=choice.number is not None,
            shape=shape,
            groups=groups,
        )
    number, params, post_training = record.number, record.params, low_rank
    if choice.number not in (None, number):
        if not number.is_float:
            raise ValueError(
                f"it was compressed to {number}, and the config's {choice.number} would quantize "
                f"it again; leave it out with filter_fn, or convert without a number"
            )
        number, params, post_training = choice.number, None, True
    return Plan(
        choice.layout or record.layout,
        number,
        choice.coding or record.coding,
        params,
        record.mask,
        post_training,
        asked=choice.number is not None,
        recorded=True,
        shape=shape,
        groups=groups,
        rows=getattr(record.activations, "rows", None),
    )


def _plan_of_factors(module: nn.Module, record: Any, choice: Choice) -> Plan:
    """The plan of a layer that was factorized: numbers and codings are those of its factors."""
    if choice.layout not in (None, record.layout):
        raise ValueError(
            f"it was factorized to {record.layout}, and the config's {choice.layout} would "
            f"multiply it out; leave it out with filter_fn, or convert without a layout"
        )
    axes = replace(choice, layout=None)
    factors = tuple((factor, plan(factor, done, axes)) for factor, done in record.factors)
    first = factors[0][1]
    return Plan(
        record.layout,
        first.number,
        first.coding,
        post_training=any(each.post_training for _, each in factors),
        asked=choice.number is not None,
        recorded=True,
        shape=tuple(module.weight.shape),
        groups=getattr(module, "groups", 1),
        factors=factors,
    )


def pack(module: nn.Module, plan: Plan) -> PackedTensor:
    """The packed weight of a float, compressed or already packed layer, on the CPU.

    Raises:
        ValueError: the weight does not fit the plan.
    """
    if isinstance(module, PackedModule):
        return _repack(module.packed_weight.packed().to("cpu"), plan)
    if module.weight.is_meta:
        raise ValueError("its weight is on the meta device, and has no values")
    own = module.weight.detach()
    if plan.factors:
        factors = [pack(factor, each) for factor, each in plan.factors]
        return PackedTensor.from_factors(factors, plan.shape, own.dtype, plan.layout)
    packed = PackedTensor.pack(
        (own if plan.weight is None else plan.weight).cpu(),
        plan.layout,
        plan.number,
        plan.coding,
        params=None if plan.params is None else {k: v.cpu() for k, v in plan.params.items()},
        mask=None if plan.mask is None else plan.mask.cpu(),
        lossy=plan.post_training,
        encoder=ops.huffman_encode,
    )
    return replace(packed, dtype=own.dtype)


def _repack(before: PackedTensor, plan: Plan) -> PackedTensor:
    """The same weight in another layout or coding, without loss."""

    def again(packed: PackedTensor, layout: Layout, number: Number) -> PackedTensor:
        values, params = packed.unpack(ops.DECODER), packed.params or None
        return PackedTensor.pack(
            values, layout, number, plan.coding, params, encoder=ops.huffman_encode
        )

    if isinstance(before.layout, LowRank) and plan.layout == before.layout:
        factors = [again(f, f.layout, f.number) for f in before.factors()]
        after = PackedTensor.from_factors(factors, before.shape, before.dtype, before.layout)
    else:
        after = again(before, plan.layout, plan.number)
    # The count of a mask that is no longer there.
    kept = {k: v for k, v in before.meta.items() if k == "kept"}
    return replace(after, meta={**after.meta, **kept})


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the layer's name into a ValueError or TypeError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"layer {layer!r}: {error}") from error
