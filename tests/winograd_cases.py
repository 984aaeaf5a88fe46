"""References of the Winograd tests: direct convolution in float64, and what errors to expect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

import compressops as co
from compressops.ops import winograd_domain as domain

# Largest errors of the GPU kernels for outputs of about 1, by alpha: about twice what was seen. The
# rounding of V to 16 bits counts for most of it, and one wrong product of many channels for more.
BOUNDS = {
    torch.float32: {4: 4e-6, 6: 1e-5, 8: 6e-5},
    torch.float16: {4: 6e-3, 6: 6e-2, 8: 2e-1},
    torch.bfloat16: {4: 5e-2, 6: 3e-1, 8: 1.2},
}


def direct(x, weight, bias, padding, groups, activation="none") -> torch.Tensor:
    """The convolution in float64 on a CPU. (torch's own forgets the bias of no channels at all.)"""
    x, weight = x.detach().cpu().double(), weight.detach().cpu().double()
    if 0 in weight.shape:
        size = domain.output_size(x.shape, weight.shape, padding)
        y = x.new_zeros((x.shape[0], weight.shape[0], *size))
    else:
        y = F.conv2d(x, weight, None, 1, padding, 1, groups)
    if bias is not None:
        y = y + bias.detach().cpu().double()[:, None, None]
    if activation == "relu":
        return y.relu()
    return F.gelu(y) if activation == "gelu" else y


@contextlib.contextmanager
def _absolute_transforms() -> Iterator[None]:
    def absolute(rows: domain.Floats) -> domain.Floats:
        return tuple(tuple(abs(value) for value in row) for row in rows)

    transforms = {
        pair: t._replace(at=absolute(t.at), g=absolute(t.g), bt=absolute(t.bt))
        for pair, t in domain._TRANSFORMS.items()
    }
    with mock.patch.object(domain, "_TRANSFORMS", transforms):
        yield


def absolute_terms(x, weight, bias, padding, groups, tile: int) -> torch.Tensor:
    """Σ of the absolute values of all terms of each output: |Aᵀ|(|G||g||Gᵀ| ⊙ |Bᵀ||d||B|)|A|."""
    x, weight = x.detach().cpu().double().abs(), weight.detach().cpu().double().abs()
    if bias is not None:
        bias = bias.detach().cpu().double().abs()
    with _absolute_transforms():
        return co.ops.winograd_conv2d_reference(x, weight, bias, padding, groups, "none", tile)


class Growth(NamedTuple):
    """Error as a multiple of that of torch's direct convolution, and in unit roundoffs.

    Attributes:
        max, rms: ratios of the largest and of the root mean square errors.
        relative: RMS error over RMS output, in unit roundoffs of the dtype.
    """

    max: float
    rms: float
    relative: float


def measured_growth(
    tile: int,
    r: int,
    dtype: torch.dtype,
    channels: int,
    device: torch.device | str = "cpu",
    flat: bool = False,
) -> Growth:
    """On normally distributed inputs and filters, for the backend that serves now."""
    generator = torch.Generator().manual_seed(channels + tile)
    rh = 1 if flat else r
    x = torch.randn(1, channels, 18, 18, generator=generator).to(dtype)
    weight = torch.randn(24, channels, rh, r, generator=generator) / (channels * rh * r) ** 0.5
    weight = weight.to(dtype)
    padding = (rh // 2, r // 2)
    expected = direct(x, weight, None, padding, 1)

    def errors(y: torch.Tensor) -> tuple[float, float]:
        error = (y.cpu().double() - expected).abs()
        return error.max().item(), error.square().mean().sqrt().item()

    x, weight = x.to(device), weight.to(device)
    ours = errors(co.ops.winograd_conv2d(x, weight, None, padding, tile=tile))
    theirs = errors(F.conv2d(x, weight, None, 1, padding))
    size = expected.square().mean().sqrt().item() * torch.finfo(dtype).eps / 2
    return Growth(ours[0] / theirs[0], ours[1] / theirs[1], ours[1] / size)
