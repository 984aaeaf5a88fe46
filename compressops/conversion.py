"""One conversion of a model: which layer becomes what, for which reasons, and its replacement."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import type_before_parametrizations as _kind

from compressops import calibration, kernels
from compressops import plan as plans
from compressops.calibrate import Calibrate
from compressops.calibration import Calibration
from compressops.compress import record
from compressops.compress.activations import input_quantizer, quantize_first_input
from compressops.formats import PackedTensor
from compressops.measure import captured_inputs
from compressops.nn import Fused, Int8Linear, PackedConv2d, PackedModule, PackedWeight, Winograd
from compressops.plan import Choice, Plan, naming
from compressops.registry import Rule, refusals, rules_for, why_not
from compressops.rivals import assume, fastest

# That a packed layer takes less room does not make it faster.
DENSE = "runs the dense kernel on decoded weights"
PLAIN = "not compressed, and no config asks for it"


@dataclass(frozen=True)
class Note:
    """What a layer was and why it became what it is: kept on the model, for `report`."""

    was: str
    why: str


class Conversion:
    """One conversion: everything is decided and built before anything is replaced."""

    def __init__(self, model: nn.Module, residency: str, prefer: str) -> None:
        self.model, self.residency, self.prefer = model, residency, prefer
        self.notes: dict[str, Note] = dict(getattr(model, "conversion_notes", {}))
        self.plans: dict[str, Plan] = {}
        self.modules: dict[str, nn.Module] = {}
        self.built: dict[str, nn.Module] = {}
        self.whys: dict[str, list[str]] = {}
        self.untouchable: set[str] = set()
        self.calibration = Calibration()
        self.weights: dict[int, list[PackedWeight]] = defaultdict(list)

    def stay(self, name: str, module: nn.Module, why: str) -> None:
        self.plans.pop(name, None)
        self.note(name, module, [why])

    def leave(self, name: str, module: nn.Module, why: str) -> None:
        """As `stay`, and nothing else shall be done with it either."""
        self.untouchable.add(name)
        self.stay(name, module, why)

    def note(self, name: str, module: nn.Module, whys: list[str]) -> None:
        """Keep what a layer was, and why it becomes what it will be."""
        # A layer that is converted twice was what it was before the first time.
        was = self.notes[name].was if name in self.notes else _kind(module).__name__
        self.whys[name] = whys
        self.notes[name] = Note(was, "; ".join(whys))

    def consider(self, name: str, module: nn.Module, choice: Choice) -> None:
        """Plan one layer, or note why it stays."""
        self.modules[name] = module
        if choice.leave:
            return self.leave(name, module, "left as it is by the config")
        if isinstance(module, PackedModule):
            return self._consider_packed(name, module, choice)
        if (why := why_not(module)) is not None:
            return self.stay(name, module, why)
        recorded = record(module)
        if recorded is None and not choice:
            return self.stay(name, module, PLAIN)
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
                elif not self._in_one_form(sharing):
                    self.plans[name] = replace(self.plans[name], shared=True)

    def _in_one_form(self, sharing: list[str]) -> bool:
        """Whether modules of layers that share a weight will read it in the same form."""
        if len({_kind(self.modules[name]) for name in sharing}) == 1:
            return True
        # With prefer="speed" it is measured, layer by layer, which module is taken.
        firsts = [self._rules_for(name)[0] for name in sharing]
        return self.prefer == "size" and len({rule.target.weight_type for rule in firsts}) == 1

    def calibrate(self, config: Calibrate, example_inputs: Any) -> None:
        """Fit the integers of the planned layers, see `calibration.fit`."""
        static = [n for n in self.plans if any(r.target is Int8Linear for r in self._rules_for(n))]
        weights = {name: id(_weight_of(self.modules[name])) for name in self.plans}
        found = calibration.fit(
            self.model, self.modules, self.plans, weights, static, config, example_inputs
        )
        self.calibration = found
        self.plans = {name: found.plan(name, plan) for name, plan in self.plans.items()}

    def build(self, example_inputs: Any) -> None:
        """Pack every planned layer and make its module."""
        self._fit_to_network()
        rules = {name: self._rules_for(name) for name in self.plans}
        inputs: dict[str, tuple[Any, ...]] = {}
        if example_inputs is not None and self.prefer == "speed":
            rivals = {n: self.modules[n] for n in rules if not all(r.runs_dense for r in rules[n])}
            inputs = captured_inputs(self.model, rivals, example_inputs) if rivals else {}
        for name, plan in list(self.plans.items()):
            module = self.modules[name]
            whys = [_reason(plan, module), *self.calibration.whys(name)]
            whys += refusals(_kind(module), plan)
            with naming(name):
                packed = plans.pack(module, plan)
                new, said = self._choose(name, rules[name], packed, inputs.get(name))
                whys += said
            if new is None:
                self.stay(name, module, "; ".join([*whys[1:], "no other module can run it"]))
            else:
                self.built[name] = new
                self.weights[id(_weight_of(module))].append(new.packed_weight)
                self.note(name, module, whys)

    def choose_kernels(self, example_inputs: Any, inplace: bool) -> None:
        """Let convolutions run as Winograd's where that is measured faster."""
        runs = {
            name: self.built.get(name, module)
            for name, module in self.modules.items()
            if name not in self.untouchable and not (inplace and module is self.model)
        }
        runs = {
            name: run
            for name, run in runs.items()
            if kernels.is_candidate(run)
            # An activation that it computes would be lost.
            and getattr(run, "activation", None) is None
            # A layer that stays hooked computes its weight on each call.
            and (isinstance(run, PackedModule) or why_not(run) is None)
        }
        layers = {name: self.modules[name] for name in runs}
        for name, verdict in kernels.choose(self.model, layers, runs, example_inputs).items():
            module = self.modules[name]
            kept = (PLAIN,) if verdict.tile is None else (PLAIN, DENSE)
            self.note(name, module, [*(w for w in self.whys[name] if w not in kept), verdict.why])
            if verdict.tile is None:
                continue
            if name not in self.built and isinstance(module, PackedModule):
                # The converted model shares no memory with this one.
                packed = copy.deepcopy(module.packed_weight.packed())
                self.built[name] = self._make(module, type(module), packed)
                self.weights[id(_weight_of(module))].append(self.built[name].packed_weight)
            run = self.built.get(name)
            if run is not None and not hasattr(run, "run_winograd"):
                packed = run.packed_weight.packed()
                self.built[name] = run = self._make(module, PackedConv2d, packed)
                self.weights[id(_weight_of(module))].append(run.packed_weight)
            if run is not None:
                run.run_winograd(Winograd(verdict.tile))
            else:
                self.built[name] = kernels.with_winograd(module, verdict.tile)

    def _fit_to_network(self) -> None:
        """Numbers that the whole network shares (`FixedPoint`) are fitted over all its weights."""
        new = {n: p for n, p in self.plans.items() if p.post_training}
        new = {n: p for n, p in new.items() if not p.factors}
        for number in {plan.number for plan in new.values()}:
            names = [name for name, plan in new.items() if plan.number == number]
            fitted = number.for_network([self.modules[n].weight.detach() for n in names])
            for name in names:
                self.plans[name] = replace(self.plans[name], number=fitted)

    def _rules_for(self, name: str) -> list[Rule]:
        kind, plan = _kind(self.modules[name]), self.plans[name]
        if issubclass(kind, PackedModule):
            return [Rule(kind, kind, lambda plan: None, runs_dense=True)]
        return rules_for(kind, plan)

    def _choose(
        self, name: str, rules: list[Rule], packed: PackedTensor, inputs: tuple[Any, ...] | None
    ) -> tuple[PackedModule | None, list[str]]:
        """The module that a layer becomes, ``None`` where none can run it, and what is to be said
        of it and of those that were not taken."""
        module, whys = self.modules[name], []
        found, said, rivals = None, [], []
        for rule in rules:
            candidate = self._make(module, rule.target, packed)
            activations = self.calibration.set_activations(name, candidate)
            if rule.runs_dense:
                found, said = candidate, [*activations, DENSE]
                break
            if self.prefer == "speed" and inputs is not None:
                rivals.append((candidate, activations))
                continue
            taken, why = assume(candidate, self.prefer)
            whys.append(why)
            if taken:
                found, said = candidate, activations
                break
        if rivals:
            best, measured = fastest(module, [candidate for candidate, _ in rivals], inputs)
            whys += measured
            if best is not None:
                found, said = rivals[best]
        return found, whys + said

    def _make(
        self, module: nn.Module, target: type[PackedModule], packed: PackedTensor, **settings: Any
    ) -> PackedModule:
        """The packed module; a weight that an equal layer already holds is shared."""
        for weight in self.weights[id(_weight_of(module))]:
            if type(weight) is target.weight_type and _same(weight.packed(), packed):
                return target.from_module(module, weight, **settings)
        return target.from_module(module, packed, self.residency, **settings)

    def load(
        self,
        name: str,
        module: nn.Module,
        target: type[PackedModule],
        config: dict[str, Any],
        packed: dict[str, PackedTensor],
    ) -> None:
        """Build one layer of a file, to stand in the place of ``module``."""
        if target is Fused:
            self.modules[name], self.built[name] = module, Fused.from_config(config)
            return
        if not issubclass(target, PackedModule):
            return self._load_float(name, module, target, config, packed)
        quantizer = None
        if "input_quantizer" in config:
            quantizer = input_quantizer(config["input_quantizer"])
            quantizer.to(module.weight.device).train(module.training)
        stored = target.from_packed(config, packed, "packed", quantizer)
        kind = _kind(module)
        if not target.replaces(kind):
            raise ValueError(f"the file has a {target.__name__}, the model a {kind.__name__}")
        options = {option: getattr(stored, option) for option in target.options}
        _check_options({**options, "bias": config["bias"]}, module)
        settings = {setting: getattr(stored, setting) for setting in target.settings}
        new = self._make(module, target, packed["weight"], **settings)
        new.input_quantizer = quantizer
        if hasattr(new, "run_winograd"):
            new.run_winograd(stored.winograd)
        self.modules[name] = module
        self.built[name] = new
        self.weights[id(_weight_of(module))].append(new.packed_weight)
        self.note(name, module, ["loaded from a file"])

    def _load_float(
        self,
        name: str,
        module: nn.Module,
        target: type[nn.Module],
        config: dict[str, Any],
        packed: dict[str, PackedTensor],
    ) -> None:
        """Build one layer of a file that has a kernel of its own, and a float weight."""
        expected = {"type", "bias", "winograd", *target.options}
        if set(config) != expected or packed:
            raise ValueError(
                f"config of {target.__name__}: expected the keys {sorted(expected)} and no packed "
                f"tensor, got {sorted(config)} and {sorted(packed)}"
            )
        if _kind(module) not in (target, target.source):
            raise ValueError(
                f"the file has a {target.__name__}, the model a {_kind(module).__name__}"
            )
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        _check_options({k: values[k] for k in (*target.options, "bias")}, module)
        runs = Winograd.from_config(config["winograd"])
        self.modules[name] = module
        self.built[name] = target.from_float(module, runs.tile, runs.aware)
        self.note(name, module, ["loaded from a file"])

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


def _carry_over(old: nn.Module, new: nn.Module, memo: dict[int, Any] | None) -> None:
    """Hooks, bias, input quantizer and, unless it is packed, the weight of the replaced layer,
    copied where the model is."""
    plain = () if isinstance(new, PackedModule) else ("weight",)
    for name in (*_HOOKS, "bias", "input_quantizer", "caller", *plain):
        value = getattr(old, name, None)
        if name == "_forward_pre_hooks":
            # Packed modules quantize their inputs themselves, because a file holds no hooks.
            value = type(value)((k, v) for k, v in value.items() if v is not quantize_first_input)
        rows = getattr(value, "rows", None) if name == "input_quantizer" else None
        if isinstance(new, PackedModule) and rows in new.row_numbers:
            # What the op does itself, with the same codes, is not to be done before it too.
            new.quantize_rows(rows)
            value = None
        if value is not None:
            setattr(new, name, value if memo is None else copy.deepcopy(value, memo))


def _check_options(stored: dict[str, Any], module: nn.Module) -> None:
    """Refuse a layer of a file whose options are not those of the model's."""
    for option, there in stored.items():
        here = getattr(module, option, None)
        here = here is not None if option == "bias" else here
        if there != here:
            raise ValueError(f"the file has {option}={there}, the model {option}={here}")


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
