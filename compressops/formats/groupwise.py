"""Numbers with a scale per row or group of the weight matrix: Int and Ternary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressops.formats.number import Number, check_weight, matrix_shape
from compressops.formats.registry import check_choice, check_fraction, check_int

MAX_GROUP_SIZE = 2**31 - 1


def _groups(shape: tuple[int, ...], group_size: int | None) -> tuple[int, int, int]:
    """``(rows, groups, group_size)`` of a weight; one group to a row where ``group_size`` is None.

    A group wider than the row is the row: group sizes never make anything larger than the weight.
    """
    rows, columns = matrix_shape(shape)
    size = max(1, columns if group_size is None else min(group_size, columns))
    return rows, math.ceil(columns / size), size


def _grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """``weight`` as float32 ``[rows, groups, group_size]``, a ragged last group padded with 0."""
    rows, groups, size = _groups(tuple(weight.shape), group_size)
    matrix = weight.detach().float().reshape(matrix_shape(tuple(weight.shape)))
    return F.pad(matrix, (0, groups * size - matrix.shape[1])).reshape(rows, groups, size)


def _spread(param: Tensor, shape: tuple[int, ...], group_size: int | None) -> Tensor:
    """``param`` ``[rows or 1, groups or 1]`` as something that broadcasts with the matrix."""
    _, columns = matrix_shape(shape)
    if param.shape[1] == 1:
        return param
    _, _, size = _groups(shape, group_size)
    return param.repeat_interleave(size, dim=1)[:, :columns]


@dataclass(frozen=True)
class Int(Number):
    """Integers with a float32 scale per output channel or per group of its inputs.

    Symmetric: scale = amax / (2^(bits−1)−1), codes within ±(2^(bits−1)−1), value = code · scale.
    Asymmetric: the range [min(x, 0), max(x, 0)] on 2^bits levels, value = (code − zero) · scale.
    Parameters: ``scales`` float32 ``[rows, groups]`` and, if asymmetric, ``zeros`` int8
    ``[rows, groups]``, over ``weight.flatten(1)``; the last group may be ragged.

    Args:
        bits: 2 to 8.
        group_size: inputs that share a scale; ``None`` is the whole row.
        symmetric: whether code 0 is 0.0.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_int("Int", "bits", self.bits, 2, 8)
        if self.group_size is not None:
            check_int("Int", "group_size", self.group_size, 1, MAX_GROUP_SIZE)
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"Int: symmetric must be true or false, got {self.symmetric!r}")

    def by_group(self, weight: Tensor) -> Tensor:
        """``weight`` as float32 ``[rows, groups, inputs]``, a ragged last group filled with 0."""
        return _grouped(weight, self.group_size)

    def param_shapes(
        self, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        size = _groups(shape, self.group_size)[:2]
        shapes = {"scales": (torch.float32, size)}
        return shapes if self.symmetric else {**shapes, "zeros": (torch.int8, size)}

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        check_weight(weight)
        x = _grouped(weight, self.group_size)
        if not x.numel():
            return {
                name: torch.zeros(size, dtype=dtype, device=weight.device)
                for name, (dtype, size) in self.param_shapes(tuple(weight.shape)).items()
            }
        if self.symmetric:
            return {"scales": x.abs().amax(2) / (2 ** (self.bits - 1) - 1)}
        low, high = x.amin(2).clamp(max=0), x.amax(2).clamp(min=0)
        levels = 2**self.bits - 1
        scales = high / levels - low / levels
        half = 2 ** (self.bits - 1)
        zeros = torch.where(scales > 0, torch.round(-half - low / scales), 0.0)
        return {"scales": scales, "zeros": zeros.clamp(-half, half - 1).to(torch.int8)}

    def _round(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        shape = tuple(weight.shape)
        x = weight.float().reshape(matrix_shape(shape))
        scales = _spread(params["scales"], shape, self.group_size)
        q = torch.round(torch.where(scales > 0, x / scales, x * 0.0))
        half = 2 ** (self.bits - 1)
        if self.symmetric:
            return q.clamp(1 - half, half - 1).reshape(shape)
        zeros = _spread(params["zeros"], shape, self.group_size)
        return (q + zeros).clamp(-half, half - 1).reshape(shape)

    def dequantize(
        self, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        shape = tuple(codes.shape)
        q = codes.float().reshape(matrix_shape(shape))
        if not self.symmetric:
            q = q - _spread(params["zeros"], shape, self.group_size)
        x = q * _spread(params["scales"], shape, self.group_size)
        return x.reshape(shape).to(dtype) + 0.0

    def zero_codes(
        self, shape: tuple[int, ...], params: dict[str, Tensor], device: torch.device
    ) -> Tensor:
        if self.symmetric:
            return super().zero_codes(shape, params, device)
        zeros = _spread(params["zeros"], shape, self.group_size)
        return zeros.expand(matrix_shape(shape)).reshape(shape).clone()


@dataclass(frozen=True)
class Ternary(Number):
    """{−α, 0, +α}: Ternary Weight Networks (Li et al. 2016, arXiv:1605.04711, eq. 3 to 6).

    Δ = threshold · mean|x|; a value is ±α where |x| > Δ, and α is the mean of those |x|.
    Parameters: ``scales`` (α) float32 ``[1, 1]``, ``[rows, 1]`` or ``[rows, groups]``. Δ is not a
    parameter: ``quantize`` takes it from the weight that it is given, as the paper does, and any
    Δ in [0, α) gives a ternary weight back unchanged.

    Args:
        granularity: what shares an α: ``"tensor"``, ``"row"`` or ``"group"``.
        group_size: inputs in a group; given if and only if ``granularity="group"``.
        threshold: Δ over mean|x|, in [0, 1).
    """

    granularity: str = "tensor"
    group_size: int | None = None
    threshold: float = 0.7
    bits = 2

    def __post_init__(self) -> None:
        check_choice("Ternary", "granularity", self.granularity, ("tensor", "row", "group"))
        if self.granularity == "group":
            check_int("Ternary", "group_size", self.group_size, 1, MAX_GROUP_SIZE)
        elif self.group_size is not None:
            raise ValueError(
                f"Ternary: group_size goes with granularity='group', got group_size="
                f"{self.group_size!r} with granularity={self.granularity!r}"
            )
        check_fraction("Ternary", "threshold", self.threshold, 0, 1)

    def _view(self, weight: Tensor) -> Tensor:
        x = _grouped(weight, self.group_size)
        return x.reshape(1, 1, x.numel()) if self.granularity == "tensor" else x

    def _mean(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Mean over the last dimension of ``_view``, its padding not counted, in float64."""
        rows, columns = matrix_shape(shape)
        if self.granularity == "tensor":
            counts = torch.tensor([rows * columns], device=x.device)
        else:
            _, groups, size = _groups(shape, self.group_size)
            starts = torch.arange(groups, device=x.device) * size
            counts = (columns - starts).clamp(max=size)
        return x.double().sum(2) / counts.clamp(min=1)

    def param_shapes(
        self, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        size = (1, 1) if self.granularity == "tensor" else _groups(shape, self.group_size)[:2]
        return {"scales": (torch.float32, size)}

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        check_weight(weight)
        shape = tuple(weight.shape)
        x = self._view(weight).abs()
        large = x > self.threshold * self._mean(x, shape)[..., None]
        scales = (x.double() * large).sum(2) / large.sum(2).clamp(min=1)
        return {"scales": scales.float()}

    def _round(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        shape = tuple(weight.shape)
        delta = self.threshold * self._mean(self._view(weight).abs(), shape)
        x = weight.detach().float().reshape(matrix_shape(shape))
        large = x.abs() > _spread(delta, shape, self.group_size)
        # NaN compares false: keep it visible instead of turning it into a 0.
        q = torch.where(large | x.isnan(), torch.sign(x) + x * 0.0, 0.0)
        return q.reshape(shape)

    def dequantize(
        self, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        shape = tuple(codes.shape)
        q = codes.float().reshape(matrix_shape(shape))
        x = q * _spread(params["scales"], shape, self.group_size)
        return x.reshape(shape).to(dtype) + 0.0
