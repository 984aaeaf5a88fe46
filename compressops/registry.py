"""Which packed module a layer becomes: the registry of `convert`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops.formats import BlockSparse, Int, LowRank, Number, Raw, Ternary
from compressops.nn import (
    AttentionQuantizer,
    BlockSparseConv2d,
    BlockSparseInt8Linear,
    BlockSparseLinear,
    Fused,
    Int4Linear,
    Int8Conv2d,
    Int8Linear,
    IntEmbedding,
    LowRankConv2d,
    LowRankIntegerLinear,
    LowRankLinear,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    TernaryEmbedding,
    TernaryLinear,
    WinogradConv1d,
    WinogradConv2d,
)
from compressops.plan import Plan


@dataclass(frozen=True)
class Rule:
    """One line of the registry: a ``source`` layer whose plan is not refused becomes a ``target``.

    ``refuses`` gives the reason for the report, ``""`` where the plan has nothing to do with the
    target, or ``None``: the target can run it.
    """

    source: type[nn.Module]
    target: type[PackedModule]
    refuses: Callable[[Plan], str | None]
    runs_dense: bool


_rules: list[Rule] = []
# A weight that scales elements one by one gains nothing from any of this, whatever its shape.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def register(
    source: type[nn.Module],
    target: type[PackedModule],
    accepts: Callable[[Plan], bool] | None = None,
    *,
    refuses: Callable[[Plan], str | None] | None = None,
    runs_dense: bool = True,
) -> None:
    """Add a rule to the registry of `convert`; later rules are asked first.

    Args:
        source: the float layer's type; exactly this type, a subclass may compute anything.
        target: the packed module. Files name it by its class name, which must be unique.
        accepts: whether the target can run this `Plan`; ``None``: any.
        refuses: instead of ``accepts``: ``None`` if the target can run it, or else the reason, for
            the report; ``""`` where there is nothing to be said.
        runs_dense: the target runs the same dense kernel as ``source``. Others are taken under
            ``prefer="speed"`` only where they are faster (measured on ``example_inputs``; without
            those, where their op has a compiled kernel).

    Raises:
        TypeError: ``source`` or ``target`` is no such class.
        ValueError: another target has this class name, or both ``accepts`` and ``refuses``.
    """
    if not (isinstance(source, type) and issubclass(source, nn.Module)):
        raise TypeError(f"source must be a subclass of nn.Module, got {source!r}")
    if not (isinstance(target, type) and issubclass(target, PackedModule)):
        raise TypeError(f"target must be a subclass of PackedModule, got {target!r}")
    known = targets().get(target.__name__)
    if known not in (None, target):
        raise ValueError(f"target: the name {target.__name__!r} already belongs to {known!r}")
    if accepts is not None and refuses is not None:
        raise ValueError(f"accepts and refuses of {target.__name__} say the same: give one of them")
    if refuses is None:
        refuses = (lambda plan: None) if accepts is None else _unless(accepts)
    _rules.append(Rule(source, target, refuses, runs_dense))


def _unless(accepts: Callable[[Plan], bool]) -> Callable[[Plan], str | None]:
    return lambda plan: None if accepts(plan) else ""


def targets() -> dict[str, type[nn.Module]]:
    """Class name to module, of all that a file may name: the packed modules of all rules, the
    layers that run another kernel on a float weight, what stands for a fused activation, and what
    rounds the operands of an attention."""
    others = (WinogradConv1d, WinogradConv2d, Fused, AttentionQuantizer)
    return {target.__name__: target for target in (*(rule.target for rule in _rules), *others)}


def rules_for(source: type[nn.Module], plan: Plan | None = None) -> list[Rule]:
    """The rules for layers of this type (and this plan), in the order in which they are asked."""
    return [
        rule
        for rule in reversed(_rules)
        if rule.source is source and (plan is None or rule.refuses(plan) is None)
    ]


def refusals(source: type[nn.Module], plan: Plan) -> list[str]:
    """Why modules that one could expect do not take layers of this type and plan."""
    return [why for rule in rules_for(source) if (why := rule.refuses(plan))]


def is_layer(module: nn.Module) -> bool:
    """Whether `convert`, `report` and the stages of a recipe have something to say about
    ``module``: it is packed, or has a weight of two or more dimensions and is no norm."""
    if isinstance(module, PackedModule):
        return True
    # A factor of a weight belongs to the layer whose weight it is.
    if isinstance(module, _NORMS) or getattr(module, "is_factor", False):
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


def _on_integers(
    target: type[PackedModule], concerns: Callable[[Number], bool], *, rounds_inputs: bool = True
) -> Callable[[Plan], str | None]:
    """``refuses`` of a module that computes with the codes of certain numbers.

    ``rounds_inputs``: activations are quantized too, which a network that was trained with such
    weights was not asked about, unless it was trained with inputs that are rounded in the same way.
    Naming the number in the config asks for it.
    """

    def refuses(plan: Plan) -> str | None:
        if not concerns(plan.number):
            return ""
        trained = plan.asked or plan.rows in target.row_numbers
        if rounds_inputs and not trained and not isinstance(plan.layout, LowRank):
            why = (
                f"it may round activations, and training did not; config={plan.number} asks for it"
            )
        elif plan.shared:
            why = "the weight is shared with a layer of another type, and held in one form"
        else:
            why = target.weight_type.refusal(plan.layout, plan.number, plan.shape)
        return why and f"{target.__name__} not used: {why}"

    return refuses


def _few_bits(number: Number) -> bool:
    return isinstance(number, Int) and number.bits <= 4


def _many_bits(number: Number) -> bool:
    return isinstance(number, Int) and number.bits > 4


def _ternary(number: Number) -> bool:
    return isinstance(number, Ternary)


def _refuses_int8_conv(plan: Plan) -> str | None:
    """Quantizing a channel takes longer than the few products of a depthwise convolution do."""
    why = _on_integers(Int8Conv2d, _many_bits)(plan)
    if why is None and plan.shape[1] == 1:
        return "Int8Conv2d not used: a depthwise convolution is slower so"
    return why


def _refuses_int_embedding(plan: Plan) -> str | None:
    whys = _on_integers(IntEmbedding, lambda n: isinstance(n, Int), rounds_inputs=False)(plan)
    if whys is None and not isinstance(plan.coding, Raw):
        return f"IntEmbedding not used: look-ups need codes of one length, got {plan.coding}"
    return whys


def _refuses_low_rank(target: type[PackedModule]) -> Callable[[Plan], str | None]:
    def refuses(plan: Plan) -> str | None:
        why = target.refusal(plan.layout, plan.shape, plan.groups)
        if why is None and plan.shared:
            why = "the weight is shared with a layer of another type, and held in one form"
        return why and f"{target.__name__} not used: {why}"

    return refuses


def _refuses_low_rank_integer(plan: Plan) -> str | None:
    """What refuses factors at all is said of `LowRankLinear`."""
    if _refuses_low_rank(LowRankLinear)(plan) is not None:
        return ""
    numbers = [each.number for _, each in plan.factors] or [plan.number]
    if not all(isinstance(number, (Int, Ternary)) for number in numbers):
        return ""
    if plan.asked:
        why = LowRankIntegerLinear.weight_type.refusal(plan.layout, numbers, plan.shape)
    else:
        why = f"it rounds activations, and training did not; config={numbers[0]} asks for it"
    return why and f"LowRankIntegerLinear not used: {why}"


def _in_blocks(target: type[PackedModule]) -> Callable[[Plan], str | None]:
    """``refuses`` of a module that multiplies the stored blocks alone."""

    def refuses(plan: Plan) -> str | None:
        if not isinstance(plan.layout, BlockSparse):
            return ""
        if plan.shared:
            return (
                f"{target.__name__} not used: the weight is shared with a layer of another type, "
                f"and held in one form"
            )
        return None

    return refuses


def _refuses_int8_blocks(plan: Plan) -> str | None:
    """Those of `Int8Linear` are said of that one."""
    if not isinstance(plan.layout, BlockSparse) or plan.shared or not plan.asked:
        return ""
    why = BlockSparseInt8Linear.weight_type.refusal(plan.layout, plan.number, plan.shape)
    return None if why is None else ""


register(nn.Linear, PackedLinear)
register(nn.Linear, BlockSparseLinear, refuses=_in_blocks(BlockSparseLinear), runs_dense=False)
for _target, _concerns in (
    (Int8Linear, _many_bits),
    (Int4Linear, _few_bits),
    (TernaryLinear, _ternary),
):
    register(nn.Linear, _target, refuses=_on_integers(_target, _concerns), runs_dense=False)
register(nn.Linear, BlockSparseInt8Linear, refuses=_refuses_int8_blocks, runs_dense=False)
# The output projection of nn.MultiheadAttention, which reads .weight and .bias itself.
register(nn.modules.linear.NonDynamicallyQuantizableLinear, PackedLinear)
register(nn.Conv1d, PackedConv1d)
register(nn.Conv2d, PackedConv2d)
register(nn.Conv2d, BlockSparseConv2d, refuses=_in_blocks(BlockSparseConv2d), runs_dense=False)
register(nn.Conv2d, Int8Conv2d, refuses=_refuses_int8_conv, runs_dense=False)
for _source, _target in ((nn.Linear, LowRankLinear), (nn.Conv2d, LowRankConv2d)):
    register(_source, _target, refuses=_refuses_low_rank(_target), runs_dense=False)
register(nn.Linear, LowRankIntegerLinear, refuses=_refuses_low_rank_integer, runs_dense=False)
register(WinogradConv1d, PackedConv1d)
register(WinogradConv2d, PackedConv2d)
register(nn.Embedding, PackedEmbedding)
register(nn.Embedding, IntEmbedding, refuses=_refuses_int_embedding, runs_dense=False)
register(
    nn.Embedding,
    TernaryEmbedding,
    refuses=_on_integers(TernaryEmbedding, _ternary, rounds_inputs=False),
    runs_dense=False,
)
