"""Quantizers of what layers and attention multiply: one range for all, or each row's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressops.compress import checks
from compressops.compress.parametrizations import _StraightThrough
from compressops.formats.groupwise import Int
from compressops.formats.number import FixedPoint, Number
from compressops.formats.registry import check_fraction, shown
from compressops.formats.ternary import Ternary
from compressops.ops.round_rows import DTYPES, round_rows, round_rows_reference

RANGES = ("running", "rows")


class InputQuantizer(nn.Module):
    """Quantizes a layer's input with one range per tensor.

    Args:
        number: a member of the number axis.
        momentum: weight of a batch in the running minimum and maximum, in [0, 1).

    Shape: any float tensor to the same shape and dtype. Until a range was observed the input
    passes unchanged. In training mode each call moves the range.
    """

    def __init__(self, number: Number, momentum: float = 0.1) -> None:
        super().__init__()
        self.number = number
        self.momentum = check_fraction("InputQuantizer", "momentum", momentum, 0, 1)
        # (minimum, maximum), and whether they were ever observed.
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("observed", torch.zeros((), dtype=torch.bool))

    def params(self) -> dict[str, Tensor]:
        """The number's parameters for the running range; scales are of one row."""
        return self.number.fit(self.range[None])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x.detach())
        if not self.observed:
            return x
        return _StraightThrough.apply(x.reshape(1, -1), self.number, self.params()).view_as(x)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        if not x.numel():
            return
        new = torch.stack([x.min(), x.max()]).float()
        if self.observed:
            self.range.lerp_(new, self.momentum)
        else:
            self.range.copy_(new)
            self.observed.fill_(True)

    def get_extra_state(self) -> dict[str, Any]:
        return {"number": self.number.to_spec(), "momentum": self.momentum}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.number = Number.from_spec(state["number"])
        self.momentum = state["momentum"]

    def extra_repr(self) -> str:
        return f"{self.number}, momentum={self.momentum}"


class RowQuantizer(nn.Module):
    """Quantizes each row (last dimension) of a layer's input to the range that it has.

    In 8 bits exactly as `ops.int8_linear` and its siblings do it, so that a layer that was trained
    with this runs on them with the same codes. Nothing clips, and the gradient is the identity.

    Args:
        number: ``Int`` without groups.

    Shape: any float tensor to the same shape and dtype. A row that holds NaN or Inf becomes NaN.
    """

    def __init__(self, number: Int) -> None:
        super().__init__()
        self.number = number

    @property
    def rows(self) -> Int:
        """The number that rows are written in, for those that know no more of a quantizer."""
        return self.number

    def forward(self, x: Tensor) -> Tensor:
        if self.number.bits == 8 and x.dtype in DTYPES:
            return round_rows(x, self.number.symmetric)
        return _RoundRows.apply(x, self.number)

    def get_extra_state(self) -> dict[str, Any]:
        return {"number": self.number.to_spec(), "ranges": "rows"}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.number = Number.from_spec(state["number"])

    def extra_repr(self) -> str:
        return str(self.number)


class _RoundRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: Int) -> Tensor:
        if number.bits == 8:
            return round_rows_reference(x, number.symmetric)
        rows = x.reshape(-1, x.shape[-1])
        finite = rows.isfinite().all(1, keepdim=True)
        rows = torch.where(finite, rows, 0.0)
        rounded = number.fake_quantize(rows, number.fit(rows))
        return torch.where(finite, rounded, torch.nan).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def check_inputs(argument: str, number: Number, ranges: str) -> None:
    """Refuse a number that inputs cannot have, or cannot have with these ranges.

    Raises:
        TypeError: ``number`` is none.
        ValueError: it is one of weights alone, or ``ranges`` is unknown or needs another.
    """
    checks.choice("ranges", ranges, RANGES)
    if ranges == "rows" and not isinstance(number, Int):
        raise ValueError(f"ranges='rows' needs {argument}=Int(…), got {number}")
    if not isinstance(number, Number):
        known = ", ".join(sorted(Number.members))
        raise TypeError(f"{argument} must be one of {known}, got {number!r}")
    if isinstance(number, Ternary):
        raise ValueError(f"{argument}={number}: inputs cannot be ternary")
    if isinstance(number, FixedPoint) and number.integer_bits is None:
        raise ValueError(
            f"{argument}={number} needs integer_bits; DynamicFixedPoint fits them by layer"
        )
    if isinstance(number, Int) and number.group_size is not None:
        raise ValueError(f"{argument}={number}: inputs have one range, group_size must be None")


def quantizer(number: Number, ranges: str) -> InputQuantizer | RowQuantizer:
    """A quantizer with one of `RANGES`."""
    return RowQuantizer(number) if ranges == "rows" else InputQuantizer(number)


def input_quantizer(spec: dict[str, Any]) -> InputQuantizer | RowQuantizer:
    """The quantizer whose ``get_extra_state`` was ``spec``; its range is not part of that.

    Raises:
        ValueError: ``spec`` describes none.
    """
    keys = set(spec) if isinstance(spec, dict) else set()
    if keys not in ({"number", "ranges"}, {"number", "momentum"}):
        raise ValueError(f"an input quantizer has number and momentum or ranges, got {shown(spec)}")
    number = Number.from_spec(spec["number"])
    ranges = spec.get("ranges", "running")
    check_inputs("number", number, ranges)
    if ranges == "rows":
        return RowQuantizer(number)
    return InputQuantizer(number, spec["momentum"])


def attach_input_quantizer(
    module: nn.Module, number: Number, ranges: str = "running"
) -> InputQuantizer | RowQuantizer:
    """Let ``module``'s first input pass through a quantizer, its child ``input_quantizer``.

    The hook is a plain function that finds the quantizer in the module, so that copying and
    pickling the module keep the two together.
    """
    if not hasattr(module, "input_quantizer"):
        module.register_forward_pre_hook(quantize_first_input)
    weight = module.parametrizations["weight"].original
    module.input_quantizer = quantizer(number, ranges).to(weight.device)
    module.input_quantizer.train(module.training)
    return module.input_quantizer


def quantize_first_input(module: nn.Module, args: tuple) -> tuple:
    """The forward pre-hook of a layer with an input quantizer."""
    return (module.input_quantizer(args[0]), *args[1:])
