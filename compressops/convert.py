"""Convert a compressed or plain model, layer by layer, to modules that hold packed weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from compressops import plan as plans
from compressops.compress import record
from compressops.compress.quantize import InputQuantizer, quantize_first_input
from compressops.formats import Number, PackedTensor
from compressops.measure import captured_inputs, median_times
from compressops.nn import PackedModule, PackedWeight
from compressops.nn.weight import check_residency
from compressops.plan import Choice, Config, Plan, naming
from compressops.registry import Rule, is_layer, rules_for, targets, why_not

# That a packed layer takes less room does not make it faster.
DENSE = "runs the dense kernel on decoded weights"


@dataclass(frozen=True)
class Note:
    """What a layer was and why it became what it is: kept on the model, for `report`."""

    was: str
    why: str


def convert(
    model: nn.Module,
    config: Config | Mapping[str, Config] = None,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example_inputs: Any = None,
    prefer: str = "speed",
    residency: str = "decoded",
    inplace: bool = False,
) -> nn.Module:
    """Replace layers by drop-in modules that hold their weights packed.

    Without a config the function of the model stays: layers that were compressed (their
    parametrizations are the record) become packed modules which compute the same bits, and the
    rest stays as it is. Layers that share a weight share its packed form.

    Args:
        model: compressed, plain, or already converted; then packed layers keep their numbers and
            take the residency, and the layout or coding of the config, if any.
        config: post-training conversion. A number quantizes the weights of every supported layer
            (rounded to nearest, not retrained), a layout or coding repacks them without loss; a
            tuple combines up to one of each. A mapping gives one of these per glob on layer names
            (first match wins; ``None`` leaves a layer as it is).
        filter_fn: ``filter_fn(module, name)`` false: the layer stays.
        example_inputs: a tensor, or a tuple or dict of arguments of ``model``, to measure on.
        prefer: ``"speed"``: no layer ends slower than the dense layer that it replaces. With
            decoded weights packed modules run the dense kernel; modules that run another one
            (`Int8Linear`) are used only where interleaved medians on ``example_inputs`` show them
            faster. Without ``example_inputs`` a compiled kernel is assumed faster, and the eager
            one slower. ``"size"``: modules that need least memory, without measuring.
        residency: ``"decoded"`` keeps a decoded weight beside the packed one; ``"packed"``
            decodes on every use: least memory, and slower; not for ``torch.compile`` with
            ``fullgraph=True``, because decoding stays out of graphs.
        inplace: change ``model`` itself. On an error nothing was changed. References to its
            layers or their weights that are held outside its tree of modules (a list, an
            optimizer) go on naming the old ones.

    Returns:
        The converted model, with the reasons for `report`. Unless ``inplace``, ``model`` is
        untouched and shares no memory with it.

    Raises:
        ValueError: a glob that matches nothing, a number for a layer that has one, a weight that
            does not fit; the message names the layer and the value.
        TypeError: ``config`` is none of the above.
    """
    if prefer not in ("speed", "size"):
        raise ValueError(f"prefer must be 'speed' or 'size', got {prefer!r}")
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    choices = plans.resolve(config, layers)
    job = _Conversion(model, check_residency(residency), prefer)
    for name, module in layers.items():
        if filter_fn is not None and not filter_fn(module, name):
            job.stay(name, module, "filtered out by filter_fn")
        else:
            job.consider(name, module, choices[name])
    job.settle_shared()
    job.build(example_inputs)
    return job.finish(inplace)


def from_packed(
    model: nn.Module,
    modules: Mapping[str, Mapping[str, Any]],
    residency: str = "decoded",
    *,
    inplace: bool = False,
) -> nn.Module:
    """Put packed modules into a float model: the second half of `load`.

    Args:
        model: a model of the architecture that was saved.
        modules: layer name to ``{"config": get_config(), "packed": packed_tensors()}``.
        residency, inplace: as in `convert`.

    Returns:
        The model with packed modules; biases and all else are still those of ``model``.

    Raises:
        ValueError: a layer is missing, of another type, or has other options or shapes; the
            message names the layer and both values.
    """
    job = _Conversion(model, check_residency(residency), "speed")
    layers = dict(model.named_modules(remove_duplicate=False))
    known = targets()
    for name, entry in modules.items():
        kind = entry["config"].get("type")
        if name not in layers:
            raise ValueError(f"layer {name!r} does not exist in the {type(model).__name__}")
        with naming(name):
            if kind not in known:
                raise ValueError(f"unknown module type {kind!r}; known: {', '.join(sorted(known))}")
            job.load(name, layers[name], known[kind], dict(entry["config"]), dict(entry["packed"]))
    return job.finish(inplace)


class _Conversion:
    """One conversion: everything is decided and built before anything is replaced."""

    def __init__(self, model: nn.Module, residency: str, prefer: str) -> None:
        self.model, self.residency, self.prefer = model, residency, prefer
        self.notes: dict[str, Note] = dict(getattr(model, "conversion_notes", {}))
        self.plans: dict[str, Plan] = {}
        self.modules: dict[str, nn.Module] = {}
        self.built: dict[str, PackedModule] = {}
        self.weights: dict[int, list[PackedWeight]] = defaultdict(list)

    def stay(self, name: str, module: nn.Module, why: str) -> None:
        self.plans.pop(name, None)
        self._note(name, module, why)

    def _note(self, name: str, module: nn.Module, why: str) -> None:
        # A layer that is converted twice was what it was before the first time.
        was = self.notes[name].was if name in self.notes else _kind(module).__name__
        self.notes[name] = Note(was, why)

    def consider(self, name: str, module: nn.Module, choice: Choice) -> None:
        """Plan one layer, or note why it stays."""
        self.modules[name] = module
        if choice.leave:
            return self.stay(name, module, "left as it is by the config")
        if isinstance(module, PackedModule):
            return self._consider_packed(name, module, choice)
        if (why := why_not(module)) is not None:
            return self.stay(name, module, why)
        recorded = record(module)
        if recorded is None and not choice:
            return self.stay(name, module, "not compressed, and no config asks for it")
        with naming(name):
            self.plans[name] = plans.plan(module, recorded, choice)

    def _consider_packed(self, name: str, module: PackedModule, choice: Choice) -> None:
        packed = module.packed_weight.packed()
        if choice.number not in (None, packed.number):
            raise ValueError(
                f"config: layer {name!r} is already packed as {packed.number}, and cannot become "
                f"{choice.number}; convert the float model instead"
            )
        layout, coding = choice.layout or packed.layout, choice.coding or packed.coding
        if (layout, coding, self.residency) == (packed.layout, packed.coding, module.residency):
            return self.stay(name, module, "already packed")
        self.plans[name] = Plan(layout, packed.number, coding, recorded=True)

    def settle_shared(self) -> None:
        """Layers that share a weight are packed together or not at all."""
        owners = _owners(self.model)
        settled = False
        while not settled:
            settled = True
            for name in list(self.plans):
                module = self.modules[name]
                sharing = owners[id(_weight_of(module))]
                staying = [other for other in sharing if other not in self.plans]
                if staying:
                    self.stay(name, module, f"shares its weight with {staying[0]!r}, which stays")
                    settled = False
                elif len({_kind(self.modules[other]) for other in sharing}) > 1:
                    self.plans[name] = replace(self.plans[name], shared=True)

    def build(self, example_inputs: Any) -> None:
        """Pack every planned layer and make its module."""
        self._fit_to_network()
        rules = {name: self._rules_for(name) for name in self.plans}
        inputs: dict[str, tuple[Any, ...]] = {}
        if example_inputs is not None and self.prefer == "speed":
            rivals = {n: self.modules[n] for n in rules if not all(r.runs_dense for r in rules[n])}
            inputs = captured_inputs(self.model, rivals, example_inputs) if rivals else {}
        for name, plan in list(self.plans.items()):
            module, whys, new = self.modules[name], [_reason(plan, self.modules[name])], None
            with naming(name):
                packed = plans.pack(module, plan)
                for rule in rules[name]:
                    candidate = self._make(module, rule.target, packed)
                    taken, why = self._judge(rule, module, candidate, inputs.get(name))
                    whys += [why] if why else []
                    if taken:
                        new = candidate
                        whys += [DENSE] if rule.runs_dense else []
                        break
            if new is None:
                self.stay(name, module, "; ".join([*whys[1:], "no other module can run it"]))
            else:
                self.built[name] = new
                self.weights[id(_weight_of(module))].append(new.packed_weight)
                self._note(name, module, "; ".join(whys))

    def _fit_to_network(self) -> None:
        """Numbers that the whole network shares (`FixedPoint`) are fitted over all its weights."""
        new = {n: p for n, p in self.plans.items() if p.post_training}
        for number in {plan.number for plan in new.values()}:
            names = [name for name, plan in new.items() if plan.number == number]
            fitted = number.for_network([self.modules[n].weight.detach() for n in names])
            for name in names:
                self.plans[name] = replace(self.plans[name], number=fitted)

    def _rules_for(self, name: str) -> list[Rule]:
        kind, plan = _kind(self.modules[name]), self.plans[name]
        if issubclass(kind, PackedModule):
            return [Rule(kind, kind, lambda plan: True, runs_dense=True)]
        return rules_for(kind, plan)

    def _judge(
        self, rule: Rule, dense: nn.Module, new: PackedModule, inputs: tuple[Any, ...] | None
    ) -> tuple[bool, str]:
        """Whether the target may replace the dense layer, and the reason to show."""
        name = rule.target.__name__
        if rule.runs_dense:
            return True, ""
        if self.prefer == "size":
            return True, f"{name}: prefer='size'"
        if inputs is None:
            backend = new.backend()
            if backend == "eager":
                return False, f"{name} not used: its op has no compiled kernel here"
            return True, f"{name}: its {backend} kernel is assumed faster, not measured"
        if parametrize.is_parametrized(dense, "weight"):
            dense = copy.deepcopy(dense)
            parametrize.remove_parametrizations(dense, "weight", leave_parametrized=True)
        ours, theirs = median_times([lambda: new(*inputs), lambda: dense(*inputs)])
        times = f"{ours * 1e6:.0f} µs, dense {theirs * 1e6:.0f} µs"
        return ours < theirs, f"{name}{'' if ours < theirs else ' not used'}: measured {times}"

    def _make(
        self, module: nn.Module, target: type[PackedModule], packed: PackedTensor
    ) -> PackedModule:
        """The packed module; a weight that an equal layer already holds is shared."""
        for weight in self.weights[id(_weight_of(module))]:
            if type(weight) is target.weight_type and _same(weight.packed(), packed):
                return target.from_module(module, weight)
        return target.from_module(module, packed, self.residency)

    def load(
        self,
        name: str,
        module: nn.Module,
        target: type[PackedModule],
        config: dict[str, Any],
        packed: dict[str, PackedTensor],
    ) -> None:
        """Build one layer of a file, to stand in the place of ``module``."""
        quantizer = None
        if "input_quantizer" in config:
            spec = config["input_quantizer"]
            quantizer = InputQuantizer(Number.from_spec(spec["number"]), spec["momentum"])
            quantizer.to(module.weight.device).train(module.training)
        stored = target.from_packed(config, packed, "packed", quantizer)
        kind = _kind(module)
        if not issubclass(kind, (target, target.source)):
            raise ValueError(f"the file has a {target.__name__}, the model a {kind.__name__}")
        for option in target.options:
            there, here = getattr(stored, option), getattr(module, option)
            if there != here:
                raise ValueError(f"the file has {option}={there}, the model {option}={here}")
        has_bias = getattr(module, "bias", None) is not None
        if has_bias != config["bias"]:
            raise ValueError(f"the file has bias={config['bias']}, the model bias={has_bias}")
        new = self._make(module, target, packed["weight"])
        new.input_quantizer = quantizer
        self.modules[name] = module
        self.built[name] = new
        self.weights[id(_weight_of(module))].append(new.packed_weight)
        self._note(name, module, "loaded from a file")

    def finish(self, inplace: bool) -> nn.Module:
        """Put the built modules into the model, or into its copy."""
        replaced = {id(self.modules[name]): new for name, new in self.built.items()}
        if inplace and id(self.model) in replaced:
            raise ValueError(
                f"inplace: the model itself is the {_kind(self.model).__name__} to be replaced; "
                f"use the return value of convert(…, inplace=False)"
            )
        # Seeded with the replacements, deepcopy never copies the weights that they replace.
        memo: dict[int, Any] = {} if inplace else dict(replaced)
        for name, new in self.built.items():
            _carry_over(self.modules[name], new, None if inplace else memo)
        result = self.model
        if inplace:
            for module in list(self.model.modules()):
                for key, child in module._modules.items():
                    if id(child) in replaced:
                        module._modules[key] = replaced[id(child)]
        else:
            result = copy.deepcopy(self.model, memo)
        result.conversion_notes = self.notes
        return result


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _carry_over(old: nn.Module, new: PackedModule, memo: dict[int, Any] | None) -> None:
    """Hooks, bias and input quantizer of the replaced layer, copied where the model is."""
    for name in (*_HOOKS, "bias", "input_quantizer"):
        value = getattr(old, name, None)
        if name == "_forward_pre_hooks":
            # Packed modules quantize their inputs themselves, because a file holds no hooks.
            value = type(value)((k, v) for k, v in value.items() if v is not quantize_first_input)
        if value is not None:
            setattr(new, name, value if memo is None else copy.deepcopy(value, memo))


def _kind(module: nn.Module) -> type[nn.Module]:
    return parametrize.type_before_parametrizations(module)


def _weight_of(module: nn.Module) -> Any:
    """What layers that share a weight have in common: the object that is shared."""
    if isinstance(module, PackedModule):
        return module.packed_weight
    if parametrize.is_parametrized(module, "weight"):
        # Parametrizations of other kinds (weight_norm) may have several originals.
        return next(module.parametrizations.weight.parameters())
    return module.weight


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """For each weight, by the id of what `_weight_of` gives, the names of the modules with it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            name = f".{name}".split(".parametrizations.")[0].removeprefix(".")
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
        if isinstance(module, PackedModule):
            owners[id(module.packed_weight)].append(name)
    return owners


def _reason(plan: Plan, module: nn.Module) -> str:
    if isinstance(module, PackedModule):
        return "was packed before; repacked as asked"
    if plan.post_training:
        return "compressed after training, as the config asks"
    return "packed as it was compressed" if plan.recorded else "packed without loss"


def _same(a: PackedTensor, b: PackedTensor) -> bool:
    return a.to_spec() == b.to_spec() and all(torch.equal(a.parts[k], b.parts[k]) for k in a.parts)
