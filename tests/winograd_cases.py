"""The Winograd tests' cases, their references in float64, and what errors to expect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import kernel_params

import compressops as co
from compressops import backends
from compressops.ops import winograd_domain as domain
from compressops.ops.winograd_transform import SUPPORTED


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


OP = "winograd_conv2d"
# The op has one kernel for all of AVX-512.
PARAMS = [p for p in kernel_params(OP) if p.values[0][2] not in ("avx512_vnni", "avx512_vbmi2")]
ALL_KERNELS = pytest.mark.parametrize("kernel", PARAMS, indirect=True)
ALL_TILES = pytest.mark.parametrize(("tile", "r"), SUPPORTED)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether the kernel runs in Triton's interpreter, which takes a second for what others do in
    a millisecond: a few cases have to do.
    """
    return backends.name(OP, "cpu") == "triton"


@dataclass(frozen=True)
class Case:
    n: int = 1
    c: int = 3
    k: int = 5
    h: int = 8
    w: int = 9
    r: int = 3
    flat: bool = False
    tile: int = 4
    padding: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str = "none"
    channels_last: bool = False


def make(case: Case, device: torch.device | str = "cpu"):
    """x, weight, bias; outputs are of the order of 1, so that gelu is tested where it bends."""
    rh = 1 if case.flat else case.r
    x = torch.randn(case.n, case.c, case.h, case.w, device=device).to(case.dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = case.c // case.groups
    weight = torch.randn(case.k, channels, rh, case.r, device=device)
    weight = (weight / max(1, channels * rh * case.r) ** 0.5).to(case.dtype)
    bias = torch.randn(case.k, device=device).to(case.dtype) if case.bias else None
    return x, weight, bias


def call(x, weight, bias, case: Case) -> torch.Tensor:
    return co.ops.winograd_conv2d(
        x, weight, bias, case.padding, case.groups, case.activation, case.tile
    )


def assert_matches(actual: torch.Tensor, x, weight, bias, case: Case) -> None:
    """Each rounding errs by at most one unit roundoff of a partial sum of absolute values.

    A wrong coefficient would be off by the size of a term, a million times the bound.
    """
    expected = direct(x, weight, bias, case.padding, case.groups, case.activation)
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    # Elsewhere the transformed weights are rounded to the dtype of x, and the input may be.
    device = x.device.type
    narrow = device != "cpu" or backends.name(OP, device) not in ("cpu", "eager")
    unit = torch.finfo(x.dtype if narrow else torch.float32).eps / 2
    size = absolute_terms(x, weight, bias, case.padding, case.groups, case.tile)
    allowed = (8 + weight.shape[1] ** 0.5) * unit * size
    # erf's error counts where gelu's tail cancels; the last rounding, where it is narrower.
    allowed = allowed + torch.finfo(torch.float32).eps
    allowed = allowed + torch.finfo(x.dtype).eps / 2 * expected.abs()
    if x.dtype == torch.float16:
        allowed = allowed + 2.0**-24  # below the least normal number
    excess = ((actual.cpu().double() - expected).abs() / allowed).max().item()
    assert excess <= 1, excess
