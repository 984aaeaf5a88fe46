"""What `calibrate` found for the layers of a conversion: their plans, their activations, and what
the report says of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from compressops.calibrate import Calibrate, Fitted, Layer, calibrate
from compressops.formats import Int, LowRank
from compressops.nn import Int8Linear, PackedModule
from compressops.ops.int8_linear import MAX_ASYMMETRIC_IN_FEATURES
from compressops.plan import Plan


@dataclass(frozen=True)
class Calibration:
    """What was found, by layer; without a config nothing was looked for."""

    config: Calibrate | None = None
    found: Mapping[str, Fitted] = field(default_factory=dict)

    def plan(self, name: str, plan: Plan) -> Plan:
        """The plan, with the integers that were fitted."""
        found = self.found.get(name)
        if found is None or found.params is None:
            return plan
        return replace(plan, params=found.params, weight=found.weight)

    def whys(self, name: str) -> list[str]:
        """What was done with the weight."""
        found = self.found.get(name)
        return [found.why] if found is not None and found.why else []

    def set_activations(self, name: str, new: PackedModule) -> list[str]:
        """Let a module quantize its activations as they were calibrated; what to say of it."""
        config, found = self.config, self.found.get(name)
        if config is None or found is None or new.op is None:
            return []
        given = config.static or not config.symmetric
        if not isinstance(new, Int8Linear):
            return [f"activations are dynamic and symmetric, or float: {new.op}"] if given else []
        if found.activations is not None:
            new.set_static(*found.activations)
        elif config.symmetric or new.in_features <= MAX_ASYMMETRIC_IN_FEATURES:
            new.set_dynamic(config.symmetric)
        if given and new.in_features > MAX_ASYMMETRIC_IN_FEATURES:
            return [f"activations are dynamic and symmetric: in_features={new.in_features}"]
        return [found.activations_why] if found.activations_why else []


def fit(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    plans: Mapping[str, Plan],
    weights: Mapping[str, int],
    static: Collection[str],
    config: Calibrate,
    example_inputs: Any,
) -> Calibration:
    """Calibrate all layers whose plans have integers.

    Args:
        model, example_inputs: to run on the data.
        modules, plans, weights: by layer; those with one weight have one number in ``weights``.
        static: the layers whose activations may have one range.
        config: what to do.

    Raises:
        ValueError: there is nothing to fit, or no data to fit it to, or they hold NaN or
            infinities; the message names layer and value.
    """
    layers = {}
    for name, plan in plans.items():
        module = modules[name]
        if not isinstance(plan.number, Int) or isinstance(plan.layout, LowRank):
            continue
        changes = plan.post_training and plan.params is None
        kind = parametrize.type_before_parametrizations(module)
        layers[name] = Layer(
            module,
            plan.number if changes else None,
            plan.mask,
            linear=issubclass(kind, nn.Linear),
            static=name in static and module.in_features <= MAX_ASYMMETRIC_IN_FEATURES,
            weight=weights[name],
        )
    if not layers:
        raise ValueError(f"calibration: no layer gets integers, {config} has nothing to fit")
    return Calibration(config, calibrate(model, layers, config, example_inputs))
