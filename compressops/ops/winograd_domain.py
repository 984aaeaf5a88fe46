"""Into the Winograd domain and back in plain PyTorch: weights, their packed forms, whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .checks import activate
from .winograd_transform import SUPPORTED, Matrix, Transform, identity_transform, kernel_transform

# CPU packing: panels of 32 output channels, the last of 16 where 16 are enough.
PANEL, BLOCK = 32, 16

# So that no size overflows 64 bits before it is asked for as memory.
MAX_PADDING = 1 << 60

Floats = tuple[tuple[float, ...], ...]


class FloatTransform(NamedTuple):
    """A :class:`~.winograd_transform.Transform` in floats, which torch.compile can trace."""

    m: int
    alpha: int
    at: Floats
    g: Floats
    bt: Floats

    @classmethod
    def of(cls, exact: Transform) -> FloatTransform:
        """The nearest float of every entry."""

        def floats(matrix: Matrix) -> Floats:
            return tuple(tuple(float(value) for value in row) for row in matrix)

        return cls(exact.m, exact.alpha, floats(exact.at), floats(exact.g), floats(exact.bt))


_IDENTITY = FloatTransform.of(identity_transform())
_TRANSFORMS = {pair: FloatTransform.of(kernel_transform(*pair)) for pair in SUPPORTED}


def transforms(weight_shape: Sequence[int], tile: int) -> tuple[FloatTransform, FloatTransform]:
    """Of height and width, for weights ``[K, C, r, r]`` or ``[K, C, 1, r]``."""
    # int: a size that is symbolic in a graph is not hashable.
    across = _TRANSFORMS[tile, int(weight_shape[3])]
    return (_IDENTITY if weight_shape[2] == 1 else across), across


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the op computes in for tensors of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded_channels(channels: int) -> int:
    """Output channels of a group with those that only fill up the CPU packing."""
    return -(-channels // BLOCK) * BLOCK


def output_size(
    x_shape: Sequence[int], weight_shape: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the convolution."""
    return (
        x_shape[2] + 2 * padding[0] - weight_shape[2] + 1,
        x_shape[3] + 2 * padding[1] - weight_shape[3] + 1,
    )


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Of the result: channels last where ``x`` is that and could be nothing else."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def transform_weight(weight: torch.Tensor, tile: int) -> torch.Tensor:
    """``[P, K, C]`` = G g Gᵀ of every filter of ``weight`` [K, C, rh, r], in its dtype."""
    K, C, rh, r = weight.shape
    both = _filter_matrix(weight.shape, tile, weight)
    taps = weight.permute(2, 3, 0, 1).reshape(rh * r, K * C)
    return (both @ taps).view(both.shape[0], K, C)


def transform_to_panels(weight: torch.Tensor, groups: int, tile: int) -> torch.Tensor:
    """The same in the CPU packing, float32 ``[groups, padded_channels(K / groups), P, C]``.

    A panel at a time, so that what is made in float64 stays in cache.
    """
    K, C, rh, r = weight.shape
    both = _filter_matrix(weight.shape, tile, weight, torch.float64)
    P, columns = both.shape[0], padded_channels(K // groups)
    by_group = weight.view(groups, K // groups, C, rh, r)
    out = weight.new_empty((groups, columns * P * C), dtype=torch.float32)
    for first in range(0, columns, PANEL):
        width = min(PANEL, columns - first)
        taps = by_group[:, first : first + width].permute(3, 4, 0, 2, 1).double()
        taps = F.pad(taps, (0, width - taps.shape[4]))  # [rh, r, groups, C, width]
        panel = both @ taps.reshape(rh * r, groups * C * width)
        panel = panel.view(P, groups, C * width).transpose(0, 1)
        out[:, first * P * C : (first + width) * P * C].view(groups, P, C * width).copy_(panel)
    return out.view(groups, columns, P, C)


def _filter_matrix(
    weight_shape: Sequence[int], tile: int, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``[P, rh · r]``: G of both dimensions in one."""
    down, across = transforms(weight_shape, tile)
    return torch.kron(matrix(down.g, like, dtype), matrix(across.g, like, dtype))


def from_panels(panels: torch.Tensor, out_channels: int) -> torch.Tensor:
    """``[P, out_channels, C]`` of what :func:`transform_to_panels` made."""
    groups, columns, P, C = panels.shape
    full = columns // PANEL * PANEL
    flat = panels.reshape(groups, columns * P * C)
    rows = flat[:, : full * P * C].reshape(groups, full // PANEL, P, C, PANEL)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(groups, P, C, full)
    last = flat[:, full * P * C :].reshape(groups, P, C, columns - full)
    rows = torch.cat([rows, last], 3)[..., : out_channels // groups]  # [groups, P, C, K / groups]
    return rows.permute(1, 0, 3, 2).reshape(P, out_channels, C)


def transform_weight_grad(
    grad: torch.Tensor, weight_shape: Sequence[int], tile: int
) -> torch.Tensor:
    """``Gᵀ u G`` of every filter: the gradient of :func:`transform_weight`, from ``[P, K, C]``."""
    K, C, rh, r = weight_shape
    both = _filter_matrix(weight_shape, tile, grad)
    taps = both.t() @ grad.reshape(len(both), K * C)
    return taps.view(rh, r, K, C).permute(2, 3, 0, 1).contiguous()


def input_tiles(
    x: torch.Tensor,
    weight_shape: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tile: int,
) -> torch.Tensor:
    """``Bᵀ d B`` of every tile, ``[P, groups, C / groups, N · tiles]``, as the op computes it."""
    down, across = transforms(weight_shape, tile)
    N, C = x.shape[:2]
    rh, r = weight_shape[2:]
    height, width = output_size(x.shape, weight_shape, padding)
    tile_rows, tile_columns = -(-height // down.m), -(-width // across.m)
    P, T = down.alpha * across.alpha, tile_rows * tile_columns
    data = x.to(accumulator(x.dtype))
    # Zeros up to the end of the last tiles.
    bottom = tile_rows * down.m + rh - 1 - x.shape[2] - padding[0]
    right = tile_columns * across.m + r - 1 - x.shape[3] - padding[1]
    data = F.pad(data, (padding[1], right, padding[0], bottom))
    # [N, C, tile_rows, tile_columns, alpha_h, alpha_w]
    tiles = data.unfold(2, down.alpha, down.m).unfold(3, across.alpha, across.m)
    v = matrix(down.bt, data) @ tiles @ matrix(across.bt, data).t()
    v = v.reshape(N, groups, C // groups, T, P).permute(4, 1, 2, 0, 3)
    return v.reshape(P, groups, C // groups, N * T)


def convolve(
    x: torch.Tensor,
    weight_shape: Sequence[int],
    transformed: torch.Tensor,
    bias: torch.Tensor | None,
    padding: Sequence[int],
    groups: int,
    activation: str,
    tile: int,
) -> torch.Tensor:
    """The whole op on ``transformed`` [P, K, C / groups]."""
    down, across = transforms(weight_shape, tile)
    N, K = x.shape[0], weight_shape[0]
    height, width = output_size(x.shape, weight_shape, padding)
    tile_rows, tile_columns = -(-height // down.m), -(-width // across.m)
    P = down.alpha * across.alpha
    v = input_tiles(x, weight_shape, padding, groups, tile)
    u = transformed.to(v.dtype).reshape(P, groups, K // groups, weight_shape[1])
    products = (u @ v).view(down.alpha, across.alpha, K, N, tile_rows, tile_columns)
    products = products.permute(3, 2, 4, 5, 0, 1)
    y = matrix(down.at, v) @ products @ matrix(across.at, v).t()
    y = y.transpose(3, 4).reshape(N, K, tile_rows * down.m, tile_columns * across.m)
    y = y[:, :, :height, :width]
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None, None]
    y = activate(y, activation).to(x.dtype)
    return y.contiguous(memory_format=memory_format(x))


def matrix(rows: Floats, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A transform's matrix on the device of ``like``, in a dtype or its."""
    return torch.tensor(rows, dtype=dtype or like.dtype, device=like.device)
