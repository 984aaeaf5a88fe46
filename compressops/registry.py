"""Which packed module a layer becomes: the registry of `convert`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops.formats import LowRank
from compressops.nn import (
    Int8Conv2d,
    Int8Linear,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    WinogradConv1d,
    WinogradConv2d,
)
from compressops.nn.linear import fits_int8
from compressops.ops.int8_linear import MAX_IN_FEATURES
from compressops.plan import Plan


@dataclass(frozen=True)
class Rule:
    """One line of the registry: a ``source`` layer whose plan is accepted becomes a ``target``."""

    source: type[nn.Module]
    target: type[PackedModule]
    accepts: Callable[[Plan], bool]
    runs_dense: bool


_rules: list[Rule] = []
# A weight that scales elements one by one gains nothing from any of this, whatever its shape.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def register(
    source: type[nn.Module],
    target: type[PackedModule],
    accepts: Callable[[Plan], bool] | None = None,
    *,
    runs_dense: bool = True,
) -> None:
    """Add a rule to the registry of `convert`; later rules are asked first.

    Args:
        source: the float layer's type; exactly this type, a subclass may compute anything.
        target: the packed module. Files name it by its class name, which must be unique.
        accepts: whether the target can run this `Plan`; ``None``: any.
        runs_dense: the target runs the same dense kernel as ``source``. Others are taken under
            ``prefer="speed"`` only where they are faster (measured on ``example_inputs``; without
            those, where their op has a compiled kernel).

    Raises:
        TypeError: ``source`` or ``target`` is no such class.
        ValueError: another target has this class name.
    """
    if not (isinstance(source, type) and issubclass(source, nn.Module)):
        raise TypeError(f"source must be a subclass of nn.Module, got {source!r}")
    if not (isinstance(target, type) and issubclass(target, PackedModule)):
        raise TypeError(f"target must be a subclass of PackedModule, got {target!r}")
    known = targets().get(target.__name__)
    if known not in (None, target):
        raise ValueError(f"target: the name {target.__name__!r} already belongs to {known!r}")
    _rules.append(Rule(source, target, accepts or (lambda plan: True), runs_dense))


def targets() -> dict[str, type[nn.Module]]:
    """Class name to module, of all that a file may name: the packed modules of all rules, and the
    layers that run another kernel on a float weight."""
    found = (*(rule.target for rule in _rules), WinogradConv1d, WinogradConv2d)
    return {target.__name__: target for target in found}


def rules_for(source: type[nn.Module], plan: Plan | None = None) -> list[Rule]:
    """The rules for layers of this type (and this plan), in the order in which they are asked."""
    return [
        rule
        for rule in reversed(_rules)
        if rule.source is source and (plan is None or rule.accepts(plan))
    ]


def is_layer(module: nn.Module) -> bool:
    """Whether `convert`, `report` and the stages of a recipe have something to say about
    ``module``: it is packed, or has a weight of two or more dimensions and is no norm."""
    if isinstance(module, PackedModule):
        return True
    if isinstance(module, _NORMS):
        return False
    # Of its own: a property would belong to a layer inside. Hooks (as of the old weight_norm)
    # leave it as a plain attribute.
    owners = (getattr(module, "parametrizations", ()), module._parameters, vars(module))
    if not any("weight" in owner for owner in owners):
        return False
    weight = module.weight
    return isinstance(weight, Tensor) and weight.ndim >= 2


def why_not(module: nn.Module) -> str | None:
    """Why no packed module can take the place of this layer (see `is_layer`); ``None``: one can.

    What cannot be packed is not compressed either: it could not be saved as what it is.
    """
    kind = parametrize.type_before_parametrizations(module)
    if not rules_for(kind):
        return f"no packed module is registered for {kind.__name__}"
    if getattr(module, "max_norm", None) is not None:
        return f"max_norm={module.max_norm} rewrites it on each use"
    if "weight" in vars(module):
        return "its weight is no parameter: a hook computes it"
    for name in getattr(module, "parametrizations", ()):
        if name != "weight":
            return f"its {name} is parametrized, which a packed module has no place for"
    return None


def _runs_int8(plan: Plan) -> bool:
    """Its activations are quantized too, which a network trained otherwise was not asked about."""
    return (
        plan.post_training
        and not plan.shared
        and fits_int8(plan.number)
        and not isinstance(plan.layout, LowRank)
        and math.prod(plan.shape[1:]) <= MAX_IN_FEATURES
    )


def _runs_int8_conv(plan: Plan) -> bool:
    """Quantizing a channel takes longer than the few products of a depthwise convolution do."""
    return _runs_int8(plan) and plan.shape[1] > 1


register(nn.Linear, PackedLinear)
register(nn.Linear, Int8Linear, _runs_int8, runs_dense=False)
# The output projection of nn.MultiheadAttention, which reads .weight and .bias itself.
register(nn.modules.linear.NonDynamicallyQuantizableLinear, PackedLinear)
register(nn.Conv1d, PackedConv1d)
register(nn.Conv2d, PackedConv2d)
register(nn.Conv2d, Int8Conv2d, _runs_int8_conv, runs_dense=False)
register(WinogradConv1d, PackedConv1d)
register(WinogradConv2d, PackedConv2d)
register(nn.Embedding, PackedEmbedding)
