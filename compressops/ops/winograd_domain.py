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
    down, across = transforms(weight.shape, tile)
    K, C, rh, r = weight.shape
    both = torch.kron(matrix(down.g, weight), matrix(across.g, weight))  # [P, rh·r]
    taps = weight.permute(2, 3, 0, 1).reshape(rh * r, K * C)
    return (both @ taps).view(down.alpha * across.alpha, K, C)


def to_panels(canonical: torch.Tensor, groups: int) -> torch.Tensor:
    """``[P, K, C]`` to the CPU packing ``[groups, padded_channels(K / groups), P, C]``, float32."""
    P, K, C = canonical.shape
    columns = padded_channels(K // groups)
    rows = canonical.float().view(P, groups, K // groups, C).permute(1, 0, 3, 2)
    rows = F.pad(rows, (0, columns - K // groups))  # [groups, P, C, columns]
    full = columns // PANEL * PANEL
    panels = rows[..., :full].reshape(groups, P, C, full // PANEL, PANEL)
    panels = panels.permute(0, 3, 1, 2, 4).reshape(groups, full * P * C)
    last = rows[..., full:].reshape(groups, (columns - full) * P * C)
    return torch.cat([panels, last], 1).view(groups, columns, P, C)


def from_panels(panels: torch.Tensor, out_channels: int) -> torch.Tensor:
    """The reverse of :func:`to_panels`."""
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
    down, across = transforms(weight_shape, tile)
    K, C, rh, r = weight_shape
    both = torch.kron(matrix(down.g, grad), matrix(across.g, grad))  # [P, rh·r]
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


def matrix(rows: Floats, like: torch.Tensor) -> torch.Tensor:
    """A transform's matrix with the dtype and device of ``like``."""
    return torch.tensor(rows, dtype=like.dtype, device=like.device)
