"""Linear layers that run as integers: weights of 8, 4 and 2 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressops import ops
from compressops.formats import Int
from compressops.nn.fused import Activating
from compressops.nn.kernel_weight import Int4Weight, Int8Weight, TernaryWeight
from compressops.nn.linear import KernelLinear
from compressops.nn.weight import PackedWeight, as_bytes
from compressops.ops.int8_linear import MAX_ASYMMETRIC_IN_FEATURES


class Int8Linear(Activating, KernelLinear):
    """`torch.nn.Linear` as W8A8: weight ``Int(bits=8)`` per row, activations in 8 bits.

    Runs `ops.int8_linear`. Activations are quantized row by row to their own range (dynamic), or
    all to one range that was observed before (static, `set_static`). The result differs from the
    float layer by the rounding of weight and activations; a row of the input that holds NaN or
    Inf gives a row of NaN. ``weight`` decodes the dense weight on each access. Under autocast the
    input is cast as `Linear` casts it, and so is the result.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Args:
        symmetric: whether activations are quantized without a zero point; default true.
        static: whether there are buffers ``x_scale`` float32 ``[]`` and, unless symmetric,
            ``x_zero`` int8 ``[]``, which the state of the layer then holds; default false.
        activation: see `Activating`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    weight_type = Int8Weight
    row_numbers = (Int(8), Int(8, symmetric=False))
    settings = ("symmetric", "static", *Activating.settings)

    def __init__(self, module: nn.Module, weight: PackedWeight, **settings: Any) -> None:
        super().__init__(module, weight, **settings)
        self.symmetric = flag("symmetric", self.symmetric, True)
        self.static = flag("static", self.static, False)
        self.register_buffer("x_scale", None)
        self.register_buffer("x_zero", None)
        if self.static or not self.symmetric:
            self._check_width()
        if self.static:
            scale, zero = getattr(module, "x_scale", None), getattr(module, "x_zero", None)
            self._hold(1.0 if scale is None else scale, 0 if zero is None else zero)

    def set_static(self, scale: float | Tensor, zero: int | Tensor | None = None) -> None:
        """Quantize all activations by this scale and zero point (``None``: symmetric) from now on.

        Raises:
            ValueError: ``scale`` is not positive and finite, or ``zero`` not from −128 to 127.
        """
        if not 0 < float(scale) < math.inf:
            raise ValueError(f"x_scale must be positive and finite, got {float(scale)}")
        if zero is not None and not -128 <= int(zero) <= 127:
            raise ValueError(f"x_zero must be from -128 to 127, got {int(zero)}")
        self._check_width()
        self.static, self.symmetric = True, zero is None
        self._hold(scale, 0 if zero is None else zero)

    def quantize_rows(self, number: Int) -> None:
        super().quantize_rows(number)
        if not self.static:
            self.set_dynamic(number.symmetric)

    def set_dynamic(self, symmetric: bool = True) -> None:
        """Quantize each row of the activations to its own range from now on."""
        if not flag("symmetric", symmetric, True):
            self._check_width()
        self.symmetric, self.static = symmetric, False
        self.x_scale = self.x_zero = None

    def _hold(self, scale: float | Tensor, zero: int | Tensor) -> None:
        device = self.packed_weight.device
        # Copies: two layers that share a weight do not share a range.
        self.x_scale = torch.empty((), dtype=torch.float32, device=device).fill_(scale)
        self.x_zero = None
        if not self.symmetric:
            self.x_zero = torch.empty((), dtype=torch.int8, device=device).fill_(zero)

    def _check_width(self) -> None:
        if self.in_features > MAX_ASYMMETRIC_IN_FEATURES:
            raise ValueError(
                f"static and asymmetric activations need in_features of at most "
                f"{MAX_ASYMMETRIC_IN_FEATURES} (int32 sums), got {self.in_features}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # A cast concerns the activations, and not the scale that quantizes them.
        held = {n: self._buffers[n] for n in ("x_scale", "x_zero") if self._buffers[n] is not None}
        super()._apply(fn, recurse)
        for name, buffer in held.items():
            self._buffers[name] = as_bytes(fn, buffer)
        return self

    def forward(self, input: Tensor) -> Tensor:
        # Not through Module's __getattr__, which takes half a microsecond for each.
        held = self._buffers
        quantization = (held["x_scale"], held["x_zero"], self.symmetric or self.static)
        activation = self.computed()
        options = self.bias, activation, *quantization
        return self.with_weight(ops.int8_linear, self.taken(input), *options)


class Int4Linear(Activating, KernelLinear):
    """`torch.nn.Linear` on weights of 2 to 4 bits, ``Int(bits=4, group_size=…)`` and the like.

    Runs `ops.int4_linear`: one scale a row, or one for each group of inputs (a multiple of 16),
    symmetric or with zero points. Activations are quantized to int8 row by row (W4A8) or taken as
    they are (W4A16, W4A32). The result differs from the float layer by the rounding of the weight,
    and of activations where those are quantized; then a row of the input that holds NaN or Inf
    gives a row of NaN. ``weight`` decodes the dense weight on each access. Under autocast the input
    is cast as `Linear` casts it, and so is the result.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Args:
        quantize_x: whether activations are quantized; ``None``: on a CPU, whose integer
            multipliers are the faster ones, and nowhere else.
        activation: see `Activating`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    weight_type = Int4Weight
    row_numbers = (Int(8),)
    settings = ("quantize_x", *Activating.settings)

    def __init__(self, module: nn.Module, weight: PackedWeight, **settings: Any) -> None:
        super().__init__(module, weight, **settings)
        self.quantize_x = flag("quantize_x", self.quantize_x, None)

    def quantize_rows(self, number: Int) -> None:
        super().quantize_rows(number)
        self.quantize_x = True

    def forward(self, input: Tensor) -> Tensor:
        quantize_x = self.quantize_x
        return self.with_weight(
            ops.int4_linear,
            self.taken(input),
            self.out_features,
            self.packed_weight.group_size,
            self.bias,
            self.computed(),
            input.device.type == "cpu" if quantize_x is None else quantize_x,
        )


class TernaryLinear(Activating, KernelLinear):
    """`torch.nn.Linear` on weights −α, 0 and α of 2 bits, and activations in 8 bits (W2A8).

    Runs `ops.ternary_linear`: one α for the tensor, a row, or a group of inputs (a multiple of 16).
    Activations are quantized row by row. The result differs from the float layer by the rounding of
    weight and activations; a row of the input that holds NaN or Inf gives a row of NaN. ``weight``
    decodes the dense weight on each access. Under autocast the input is cast as `Linear` casts it,
    and so is the result. The weight may be that of a `TernaryEmbedding`, in memory once.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Args:
        activation: see `Activating`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    weight_type = TernaryWeight
    row_numbers = (Int(8),)

    def forward(self, input: Tensor) -> Tensor:
        options = self.out_features, self.packed_weight.group_size, self.bias
        input = self.taken(input)
        return self.with_weight(ops.ternary_linear, input, *options, self.computed())


def flag(name: str, value: Any, default: bool | None) -> bool | None:
    """``value``, or ``default`` where it is ``None``.

    Raises:
        ValueError: it is neither ``None`` nor a bool.
    """
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true, false or None, got {value!r}")
    return value
