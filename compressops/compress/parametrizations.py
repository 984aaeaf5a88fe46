"""The parametrizations of a compressed weight, which together are the record of what was done.

``module.weight`` of a compressed layer is computed from ``module.parametrizations.weight.original``
(what the optimizer trains) by a chain of `Mask`, `FakeQuantize` and `Coded`. They compose in any
order, and ``state_dict``, ``deepcopy`` and ``pickle`` keep them. Of a factorized layer `Factors`
takes the place of the original, and each factor has a chain of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops.formats.coding import Coding, Raw
from compressops.formats.decompose import decompose
from compressops.formats.groupwise import Int
from compressops.formats.layout import BlockSparse, Dense, Layout, Sparse
from compressops.formats.lowrank import LowRank
from compressops.formats.number import Float, Number
from compressops.formats.ternary import Ternary

P = TypeVar("P", bound=nn.Module)


class _MaskedStraightThrough(torch.autograd.Function):
    """Forward ``where(mask, weight, 0)``; the gradient reaches pruned entries too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Parametrization(nn.Module):
    # Tells ours from torch's, or a user's.
    is_compression = True

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``module.weight = value`` sets the original."""
        return weight


class Mask(_Parametrization):
    """Keeps the entries where ``mask`` is true; the others are exactly +0.0.

    Args:
        mask: bool, shape of the weight.
        block: ``(rows, columns)`` of the blocks of ``weight.flatten(1)`` the mask is made of,
            ``None`` for single entries.

    Attributes:
        recover: lets gradients through to pruned entries, so that they can come back (dynamic
            network surgery, Guo et al. 2016, eq. 4). A schedule turns it on while it runs.
        start: the density that a cubic schedule goes down from. In the state, because a resumed
            run finds masks that are on their way already.
    """

    def __init__(self, mask: Tensor, block: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.block = block
        self.recover = False
        self.start = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        if self.recover:
            return _MaskedStraightThrough.apply(weight, self.mask)
        return torch.where(self.mask, weight, 0.0)

    def get_extra_state(self) -> dict[str, Any]:
        return {"start": self.start}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.start = state["start"]

    def extra_repr(self) -> str:
        return f"density={self.mask.float().mean().item():.4f}, block={self.block}"


class _StraightThrough(torch.autograd.Function):
    """Clipped straight-through estimator (Hubara et al. 2016): rounding counts as the identity.

    Outside the range of the codes the gradient is dropped, unless it pulls the entry back into
    the range: without that exception a clipped entry could never move again.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, number: Number, params: dict) -> Tensor:
        quantized = number.fake_quantize(weight, params)
        # Float has no end to speak of; a ternary weight is meant to lie beyond ±α.
        ctx.clips = ctx.needs_input_grad[0] and not isinstance(number, (Float, Ternary))
        if ctx.clips:
            bottom, top = _range(number, weight, params)
            ctx.save_for_backward(weight > top, weight < bottom)
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.clips:
            return grad, None, None
        above, below = ctx.saved_tensors
        # Descent lowers the weight where the gradient is positive.
        outward = (above & (grad < 0)) | (below & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


def _range(number: Number, weight: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that ``number`` can write, as something that broadcasts."""
    half = 2 ** (number.bits - 1)
    low = 1 - half if isinstance(number, Int) and number.symmetric else -half
    # One value serves where the whole tensor shares its parameters.
    shape = weight.shape if isinstance(number, Int) else (1,)
    bottom, top = (
        number.dequantize(
            torch.full(shape, code, dtype=number.code_dtype, device=weight.device),
            params,
            weight.dtype,
        )
        for code in (low, half - 1)
    )
    return bottom, top


class FakeQuantize(_Parametrization):
    """Replaces the weight by the nearest that ``number`` can write; straight-through gradient.

    Args:
        number: a member of the number axis, fully specified (no ``integer_bits=None``).
        params: what ``number.fit`` returned, e.g. integer bits or scales; kept as buffers.
        refit: when `Retrain` fits ``params`` anew: ``"never"``, ``"epoch"`` or ``"step"``.
        solver, loss_aware: how a `Ternary` without threshold is then fitted, see `Quantize`.
    """

    def __init__(
        self,
        number: Number,
        params: dict[str, Tensor],
        refit: str = "never",
        solver: str | None = None,
        loss_aware: bool = False,
    ) -> None:
        super().__init__()
        self.set_number(number, params, refit, solver, loss_aware)

    def set_number(
        self,
        number: Number,
        params: dict[str, Tensor],
        refit: str,
        solver: str | None = None,
        loss_aware: bool = False,
    ) -> None:
        for name in list(self._buffers):
            delattr(self, name)
        self.number = number
        self.refit = refit
        self.solver, self.loss_aware = solver, loss_aware
        for name, value in params.items():
            self.register_buffer(name, value)

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self._buffers)

    def fit(self, weight: Tensor, curvature: Tensor | None = None) -> None:
        """Fit the parameters to ``weight``, and the loss's curvature if it is given, in place."""
        how = {}
        if self.solver is not None:
            start = self.scales if self.solver == "alternating" else None
            how = {"curvature": curvature, "start": start}
        for name, value in self.number.fit(weight.detach(), **how).items():
            self._buffers[name].copy_(value)

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.number, self.params)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "number": self.number.to_spec(),
            "refit": self.refit,
            "solver": self.solver,
            "loss_aware": self.loss_aware,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.number = Number.from_spec(state["number"])
        self.refit = state["refit"]
        self.solver, self.loss_aware = state["solver"], state["loss_aware"]

    def extra_repr(self) -> str:
        return f"{self.number}, refit={self.refit!r}"


class Coded(_Parametrization):
    """Changes nothing; records the lossless coding that the weight is to be packed with."""

    def __init__(self, coding: Coding) -> None:
        super().__init__()
        self.coding = coding

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def get_extra_state(self) -> dict[str, Any]:
        return self.coding.to_spec()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.coding = Coding.from_spec(state)

    def extra_repr(self) -> str:
        return str(self.coding)


class Factor(nn.Module):
    """One factor of a weight; pruned, quantized and coded as the weight of a layer is."""

    # What walks over a model's layers passes it over: it belongs to one of them.
    is_factor = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Factors(_Parametrization):
    """Computes the weight from the factors that it holds; the original has no entries.

    Args:
        layout: the form of the factors and their rank.
        factors: in the order of its ``names``.
        shape: of the weight.
    """

    def __init__(self, layout: LowRank, factors: Sequence[Tensor], shape: torch.Size) -> None:
        super().__init__()
        self.layout, self.shape = layout, tuple(shape)
        for name, factor in zip(layout.names, factors, strict=True):
            self.add_module(name, Factor(factor))
        self._attached = False

    def factors(self) -> list[Factor]:
        return [getattr(self, name) for name in self.layout.names]

    def forward(self, original: Tensor) -> Tensor:
        return self.layout.compose([factor.weight for factor in self.factors()], self.shape)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """``module.weight = value`` factorizes the value; the first call attaches the factors that
        are there."""
        if self._attached and weight.numel():
            for factor, value in zip(self.factors(), decompose(self.layout, weight), strict=True):
                factor.weight = nn.Parameter(value)
        self._attached = True
        return weight.new_empty(0)

    def get_extra_state(self) -> dict[str, Any]:
        return {"layout": self.layout.to_spec(), "shape": list(self.shape)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != (own := self.get_extra_state()):
            raise ValueError(f"a state of factors {state} does not fit {own}")

    def extra_repr(self) -> str:
        return f"{self.layout}, shape={list(self.shape)}"


@dataclass(frozen=True)
class WeightRecord:
    """What was done to a weight: the arguments of ``PackedTensor.pack``.

    ``params`` and ``mask`` are ``None`` where no stage made any. ``activations`` is the
    `InputQuantizer` of the layer, if it has one. ``factors`` are the modules of a factorized
    weight's factors, each with its own record.
    """

    layout: Layout
    number: Number
    params: dict[str, Tensor] | None
    coding: Coding
    mask: Tensor | None
    activations: nn.Module | None = None
    factors: tuple[tuple[nn.Module, WeightRecord | None], ...] = ()


def record(module: nn.Module, name: str = "weight") -> WeightRecord | None:
    """The record of ``module``'s tensor ``name``; ``None`` where nothing was done to it."""
    if (factorized := find(module, Factors, name)) is not None:
        return _record_of_factors(module, factorized)
    mask = find(module, Mask, name)
    quantized = find(module, FakeQuantize, name)
    coded = find(module, Coded, name)
    if not any(part is not None for part in (mask, quantized, coded)):
        return None
    if mask is None:
        layout = Dense()
    elif mask.block is None:
        layout = Sparse()
    else:
        layout = BlockSparse(mask.block)
    dtype = module.parametrizations[name].original.dtype
    return WeightRecord(
        layout=layout,
        number=quantized.number if quantized else Float(str(dtype).removeprefix("torch.")),
        params=quantized.params if quantized else None,
        coding=coded.coding if coded else Raw(),
        mask=mask.mask if mask else None,
        activations=getattr(module, "input_quantizer", None),
    )


def _record_of_factors(module: nn.Module, factorized: Factors) -> WeightRecord:
    """Number and coding of the whole are those of u, as in a file."""
    factors = tuple((factor, record(factor)) for factor in factorized.factors())
    first, done = factors[0]
    return WeightRecord(
        layout=factorized.layout,
        number=done.number if done else Float(str(first.weight.dtype).removeprefix("torch.")),
        params=None,
        coding=done.coding if done else Raw(),
        mask=None,
        activations=getattr(module, "input_quantizer", None),
        factors=factors,
    )


def parametrizations(module: nn.Module, name: str = "weight") -> list[nn.Module]:
    if not parametrize.is_parametrized(module, name):
        return []
    return list(module.parametrizations[name])


def find(module: nn.Module, kind: type[P], name: str = "weight") -> P | None:
    """The parametrization of type ``kind`` on ``module``'s tensor ``name``, if there is one."""
    return next((p for p in parametrizations(module, name) if isinstance(p, kind)), None)


def input_of(module: nn.Module, parametrization: nn.Module, name: str = "weight") -> Tensor:
    """The tensor that goes into ``parametrization``: the original after those before it."""
    with torch.no_grad():
        value = module.parametrizations[name].original
        for earlier in parametrizations(module, name):
            if earlier is parametrization:
                break
            value = earlier(value)
        return value


def register(module: nn.Module, parametrization: nn.Module, name: str = "weight") -> None:
    """Append ``parametrization`` to the chain of ``module``'s tensor ``name``."""
    # unsafe: the checks only compare shape and dtype, which every class here keeps.
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    # torch refuses to pickle parametrized modules, because their class is made on the fly; a
    # class that says how to make it again can be pickled.
    type(module).__reduce_ex__ = _reduce


def _reduce(module: nn.Module, protocol: int) -> tuple:
    plain = type(module).__mro__[1]
    return _blank, (plain,), dict(module.__dict__), None, None, _restore


def _blank(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    nn.Module.__setstate__(module, state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)
    type(module).__reduce_ex__ = _reduce
