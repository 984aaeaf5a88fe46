"""The small cases of `gpu_verify.py`, and the arguments that its figures are measured with."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from common import ROOT

import compressops as co
from compressops.ops.winograd_transform import SUPPORTED

sys.path.append(str(ROOT / "tests"))
from winograd_bounds import BOUNDS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIZES = (0, 1, 7, 16, 17, 64, 129)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Check(NamedTuple):
    """An op on arguments, and how far from `eager` its backends may be.

    Attributes:
        op, arguments: of the call.
        bound: the largest difference; None for torch's default tolerances.
        relative: what it may be more, as a multiple of the value.
        rms: the largest root mean square of the differences; None for any.
        refused_by: backends that have no kernel for such arguments.
        writes: to the first argument; what is compared then is its bits.
    """

    op: str
    arguments: tuple
    bound: float | None = None
    relative: float = 0.0
    rms: float | None = None
    refused_by: tuple[str, ...] = ()
    writes: bool = False

    def run(self, backend: str) -> torch.Tensor:
        first, *others = self.arguments
        if self.writes:
            first = torch.zeros_like(first)
        with co.backend(backend):
            result = getattr(torch.ops.compressops, self.op)(first, *others)
        if self.writes:
            return first.view(torch.int16 if first.element_size() == 2 else torch.int32)
        return result

    def compare(self, backend: str, actual: torch.Tensor, expected: torch.Tensor) -> float:
        """The largest difference; raises where it or its root mean square is too large."""
        limits = {} if self.bound is None else {"rtol": self.relative, "atol": self.bound}
        torch.testing.assert_close(actual, expected, **limits)
        if not actual.numel():
            return 0.0
        difference = (actual.double() - expected.double()).abs()
        rms = difference.square().mean().sqrt().item()
        if self.rms is not None and rms > self.rms:
            case = f"{self.op} on {backend}, {actual.dtype} {list(actual.shape)}"
            raise AssertionError(f"{case}: RMS difference {rms:.3g} > {self.rms:.3g}")
        return difference.max().item()


def int8_arguments(m: int, k: int, n: int, dtype: torch.dtype, activation: str = "none") -> tuple:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
    sums = weight.sum(1, dtype=torch.int32)
    x, scales = torch.randn(m, k, device=DEVICE).to(dtype), torch.rand(n, device=DEVICE) / 127
    return x, weight, scales, sums, torch.randn(n, device=DEVICE), activation


def int8_quantizations() -> tuple[tuple, ...]:
    """x_scale, x_zero and symmetric of `int8_linear` besides the dynamic symmetric ones."""
    scale = torch.tensor(0.02, device=DEVICE)
    zero = torch.tensor(-77, dtype=torch.int8, device=DEVICE)
    return (None, None, False), (scale, None, True), (scale, zero, True)


def int8_cases(small: bool) -> Iterator[Check]:
    for m, k, n in itertools.product((1, 17, 65) if small else SIZES, repeat=3):
        yield Check("int8_linear", int8_arguments(m, k, n, torch.float32))
    for dtype, activation in itertools.product(FLOATS, ("none", "relu", "gelu")):
        yield Check("int8_linear", int8_arguments(130, 208, 140, dtype, activation))
    for m, k, quantization in itertools.product((5, 66), (100, 96), int8_quantizations()):
        yield Check("int8_linear", (*int8_arguments(m, k, 70, torch.float32), *quantization))
    # On an H200 tiles of 128 × 128 and 128 × 256 of wgmma, more of them than multiprocessors: bit
    # for bit what the reference says, as the kernels for other shapes give it.
    hopper = [((2177, 1032), torch.bfloat16)] if GPU else []
    if not small:
        hopper = list(itertools.product(((2177, 1032), (4100, 1064)), FLOATS)) if GPU else []
    for (m, n), dtype in hopper:
        arguments = int8_arguments(m, 1168, n, dtype, "relu")
        for quantization in ((), *int8_quantizations()):
            yield Check("int8_linear", (*arguments, *quantization), bound=0.0)


def round_cases(small: bool) -> Iterator[Check]:
    for rows, columns in itertools.product((1, 17) if small else SIZES, (1, 17, 32, 64, 129, 1040)):
        for dtype, symmetric in itertools.product(FLOATS, (True, False)):
            # As attention's heads lie, at addresses of any alignment.
            wide = torch.randn(2, rows, 3 * columns + 1, device=DEVICE).to(dtype)
            heads = wide[..., 1:].unflatten(2, (3, columns)).transpose(1, 2)
            for x in (heads, heads.contiguous()):
                yield Check("round_rows", (x, symmetric), bound=0.0)


def conv_arguments(
    shape: tuple[int, int, int, int],
    out_channels: int,
    kernel: tuple[int, int] = (3, 3),
    options: tuple = ((1, 1), (1, 1), (1, 1), 1),
    dtype: torch.dtype = torch.float32,
    last: bool = True,
    activation: str = "none",
) -> tuple:
    """Of `int8_conv2d`; options: stride, padding, dilation, groups."""
    groups = options[3]
    size = (out_channels, shape[1] // groups, *kernel)
    weight = torch.randint(-127, 128, size, dtype=torch.int8, device=DEVICE)
    packed, sums = co.ops.int8_conv2d_pack(weight, groups)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    scales = torch.rand(out_channels, device=DEVICE) / 127
    bias = torch.randn(out_channels, device=DEVICE)
    return x, packed, scales, sums, bias, *map(list, options[:3]), groups, activation


def conv_cases(small: bool) -> Iterator[Check]:
    quantizations = itertools.cycle([(), *int8_quantizations()])
    one = ((1, 1), (0, 0), (1, 1), 1)
    cases = [
        ((2, 5, 9, 8), 7, (3, 3), ((1, 1), (4, 5), (1, 1), 1)),
        ((1, 34, 7, 9), 65, (1, 1), one),
        ((2, 3, 23, 21), 16, (7, 7), ((2, 2), (3, 3), (1, 1), 1)),
        ((1, 40, 9, 9), 36, (3, 3), ((1, 2), (2, 2), (2, 1), 2)),
        ((2, 12, 6, 6), 30, (3, 2), ((1, 1), (1, 0), (1, 1), 3)),
        ((2, 37, 9, 7), 37, (5, 3), ((2, 1), (2, 1), (1, 1), 37)),
    ]
    if not small:
        cases += [
            ((0, 4, 8, 8), 4, (3, 3), ((1, 1), (1, 1), (1, 1), 1)),
            ((9, 130, 29, 31), 258, (3, 3), ((1, 1), (1, 1), (1, 1), 1)),
            ((4, 128, 56, 56), 128, (3, 3), ((1, 1), (1, 1), (1, 1), 32)),
        ]
    for case, dtype, last in itertools.product(cases, FLOATS, (False, True)):
        activation = ("none", "relu", "gelu")[case[1] % 3]
        arguments = conv_arguments(*case, dtype, last, activation)
        yield Check("int8_conv2d", (*arguments, *next(quantizations)))


def packed_arguments(
    op: str,
    m: int,
    k: int,
    n: int,
    group: int | None,
    dtype: torch.dtype,
    zeros: bool = False,
    activation: str = "none",
) -> tuple:
    """Of `int4_linear`, less quantize_x, and of `ternary_linear`."""
    ternary = op == "ternary_linear"
    low, high = (-1, 2) if ternary else (-8, 8)
    groups = -(-k // (group or max(1, k)))
    codes = torch.randint(low, high, (n, k), dtype=torch.int8, device=DEVICE)
    scales = torch.rand(n, groups, device=DEVICE) / 8 / max(k, 1) ** 0.5
    x, bias = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE)
    if ternary:
        packed = co.ops.ternary_linear_pack(codes, scales, group)
    else:
        points = torch.randint(low, high, (n, groups), dtype=torch.int8, device=DEVICE)
        packed = co.ops.int4_linear_pack(codes, scales, points if zeros else None, group)
    return x, *packed, n, group, bias, activation


# Of outputs of about 1: sums in float32, and the last rounding.
PACKED_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def packed_cases(op: str, small: bool) -> Iterator[Check]:
    shapes = [(1, 200, 70, 16), (17, 136, 65, 32), (5, 1100, 130, 128), (65, 96, 129, None)]
    shapes += [] if small else [(16, 4096, 4096, 128), (300, 1024, 1031, 64), (0, 8, 8, None)]
    # On an H200: tiles of wgmma, more of them than multiprocessors; few rows and tiles of 64
    # outputs; a split of the inputs, twice, since tickets are kept.
    shapes += [(1500, 616, 1497, 128), (8, 1032, 6500, 128)] if GPU else []
    shapes += [(9, 4096, 2050, 128)] * 2 if GPU else []
    # As they are, 4-bit weights' activations are multiplied on a GPU alone.
    modes = (True, False) if op == "int4_linear" and GPU else (True,)
    for (m, k, n, group), dtype, quantize_x in itertools.product(shapes, FLOATS, modes):
        activation = ("none", "relu", "gelu")[(m + k) % 3]
        arguments = packed_arguments(op, m, k, n, group, dtype, k % 3 == 0, activation)
        mode = () if op == "ternary_linear" else (quantize_x,)
        bound = PACKED_BOUNDS[dtype]
        yield Check(op, (*arguments, *mode), bound, bound)


def winograd_tensors(
    shape: tuple[int, int, int, int],
    out_channels: int,
    kernel: tuple[int, int],
    dtype: torch.dtype,
    groups: int = 1,
    last: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a weight for outputs of about 1."""
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    taps = shape[1] // groups * kernel[0] * kernel[1]
    weight = torch.randn(out_channels, shape[1] // groups, *kernel, device=DEVICE)
    return x, (weight / max(taps, 1) ** 0.5).to(dtype)


# Of the bound for the largest difference; the RMS difference is a tenth to a thirtieth of it. For
# results of so many outputs and more.
WINOGRAD_RMS, WINOGRAD_RMS_OUTPUTS = 1 / 6, 100


def winograd_cases(small: bool) -> Iterator[Check]:
    layouts = itertools.product((False, True), (False, True), FLOATS)
    shapes = [(1, 10, 24, 9, 12), (2, 33, 65, 13, 10), (1, 64, 64, 7, 7)]
    shapes += [] if small else [(5, 130, 258, 29, 31), (1, 3, 5, 1, 1), (0, 4, 4, 8, 8)]
    for (last, flat, dtype), (tile, r) in itertools.product(layouts, SUPPORTED):
        kernel = (1 if flat else r, r)
        padding = [kernel[0] // 2, r // 2]
        for N, C, K, H, W in shapes[:1] if small and r != 3 else shapes:
            groups = 2 if C % 2 == 0 and K % 2 == 0 and C < 64 else 1
            x, weight = winograd_tensors((N, C, H, W), K, kernel, dtype, groups, last)
            packed = co.ops.winograd_conv2d_pack(weight, groups, tile)
            bias = torch.randn(K, device=DEVICE)
            activation = ("none", "relu", "gelu")[(C + tile) % 3]
            bound = BOUNDS[dtype][tile + r - 1]
            yield Check(
                "winograd_conv2d",
                (x, weight, packed, bias, padding, groups, activation, tile),
                bound,
                rms=bound * WINOGRAD_RMS if N * H * W * K >= WINOGRAD_RMS_OUTPUTS else None,
            )


def winograd_grad_cases(small: bool) -> Iterator[Check]:
    for dtype, tile in itertools.product(FLOATS, (2, 4)):
        x, weight = winograd_tensors((2, 6, 9, 12), 8, (3, 3), dtype)
        grad = torch.randn(2, weight.shape[0], 9, 12, device=DEVICE).to(dtype)
        yield Check("winograd_conv2d_grad", (x, grad, [3, 3], [1, 1], 1, tile), 1e-2, 1e-2)


Cases = dict[str, Callable[[bool], Iterator[Check]]]
INTEGER_CASES: Cases = {
    "int4_linear": functools.partial(packed_cases, "int4_linear"),
    "ternary_linear": functools.partial(packed_cases, "ternary_linear"),
    "int8_linear": int8_cases,
    "int8_conv2d": conv_cases,
    "round_rows": round_cases,
}
OTHER_CASES: Cases = {
    "winograd_conv2d": winograd_cases,
    "winograd_conv2d_grad": winograd_grad_cases,
}
