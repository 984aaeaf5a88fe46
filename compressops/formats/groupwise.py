"""Integers with a scale per row or group of the weight matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressops.formats.number import Number, check_weight, matrix_shape
from compressops.formats.registry import check_int

MAX_GROUP_SIZE = 2**31 - 1
# Entries that are dequantized together: no fewer, because each time kernels are launched.
_AT_ONCE = 1 << 18


def groups(shape: tuple[int, ...], group_size: int | None) -> tuple[int, int, int]:
    """``(rows, groups, group_size)`` of a weight; one group to a row where ``group_size`` is None.

    A group wider than the row is the row: group sizes never make anything larger than the weight.
    """
    rows, columns = matrix_shape(shape)
    size = max(1, columns if group_size is None else min(group_size, columns))
    return rows, math.ceil(columns / size), size


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """``weight`` as float32 ``[rows, groups, group_size]``, a ragged last group padded with 0."""
    rows, count, size = groups(tuple(weight.shape), group_size)
    matrix = weight.detach().float().reshape(matrix_shape(tuple(weight.shape)))
    return F.pad(matrix, (0, count * size - matrix.shape[1])).reshape(rows, count, size)


def spread(param: Tensor, shape: tuple[int, ...], group_size: int | None) -> Tensor:
    """``param`` ``[rows or 1, groups or 1]`` as something that broadcasts with the matrix."""
    _, columns = matrix_shape(shape)
    if param.shape[1] == 1:
        return param
    _, _, size = groups(shape, group_size)
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
        return grouped(weight, self.group_size)

    def param_shapes(
        self, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        size = groups(shape, self.group_size)[:2]
        shapes = {"scales": (torch.float32, size)}
        return shapes if self.symmetric else {**shapes, "zeros": (torch.int8, size)}

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        check_weight(weight)
        x = grouped(weight, self.group_size)
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
        scales = spread(params["scales"], shape, self.group_size)
        q = torch.round(torch.where(scales > 0, x / scales, x * 0.0))
        half = 2 ** (self.bits - 1)
        if self.symmetric:
            return q.clamp(1 - half, half - 1).reshape(shape)
        zeros = spread(params["zeros"], shape, self.group_size)
        return (q + zeros).clamp(-half, half - 1).reshape(shape)

    def dequantize(
        self, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        shape = tuple(codes.shape)
        q = codes.float().reshape(matrix_shape(shape))
        if not self.symmetric:
            q = q - spread(params["zeros"], shape, self.group_size)
        x = q * spread(params["scales"], shape, self.group_size)
        return x.reshape(shape).to(dtype).add_(0.0)

    def dequantize_into(
        self, out: Tensor | None, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        if out is None or codes.dim() < 2:
            return super().dequantize_into(out, codes, params, dtype)
        # Some rows at a time: as floats, a table of embeddings takes more than the rest of a model.
        step = max(1, _AT_ONCE // max(1, codes[:1].numel()))
        for first in range(0, len(codes), step):
            rows = slice(first, first + step)
            some = {name: param[rows] for name, param in params.items()}
            out[rows] = self.dequantize(codes[rows], some, dtype)
        return out

    def zero_codes(self, out: Tensor, params: dict[str, Tensor]) -> Tensor:
        if self.symmetric:
            return super().zero_codes(out, params)
        shape = tuple(out.shape)
        zeros = spread(params["zeros"], shape, self.group_size)
        return out.copy_(zeros.expand(matrix_shape(shape)).reshape(shape))
