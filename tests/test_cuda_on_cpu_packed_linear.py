"""The CUDA kernels of int4_linear and ternary_linear, run on a CPU, against exact sums."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import harness

from compressops.ops.int8_linear import quantize_rows
from compressops.ops.packed_linear import Codes

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")
ORDERS = tuple(harness.ORDERS)
KINDS = {4: Codes("int4_linear", 4, 8), 2: Codes("ternary_linear", 2, 1)}


@pytest.fixture(scope="module")
def library():
    return harness.build("packed_linear")


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group: int | None = None
    bits: int = 4
    zeros: bool = False
    quantize_x: bool = False
    dtype: torch.dtype = torch.float16
    bias: bool = True
    activation: str = "none"
    kernel: str = "auto"
    splits: int = 0


@dataclass(frozen=True)
class Layer:
    """A weight as integers and scales; ``dense`` in float64."""

    case: Case
    codes: torch.Tensor  # unsigned
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None

    @staticmethod
    def make(case: Case) -> Layer:
        groups = -(-case.K // (case.group or max(1, case.K)))
        codes = torch.randint(0, 2**case.bits - (case.bits == 2), (case.N, case.K))
        zeros = torch.randint(0, 16, (case.N, groups)) if case.zeros else None
        scales = torch.rand(case.N, groups) / 8 + 1e-3
        bias = torch.randn(case.N) if case.bias else None
        return Layer(case, codes.to(torch.uint8), scales, zeros, bias)

    def dense(self) -> torch.Tensor:
        K = self.case.K
        size = min(self.case.group or K, K) or 1
        zeros = KINDS[self.case.bits].zero
        if self.zeros is not None:
            zeros = self.zeros.double().repeat_interleave(size, 1)[:, :K]
        return (self.codes.double() - zeros) * self.scales.double().repeat_interleave(size, 1)[
            :, :K
        ]

    def run(self, library, x: torch.Tensor, order: str = "forward") -> torch.Tensor:
        case, kind = self.case, KINDS[self.case.bits]
        zeros = None if self.zeros is None else self.zeros.to(torch.uint8).t().contiguous()
        return harness.packed_linear(
            *(library, kind, x, kind.pack_fragments(self.codes), self.scales.t().contiguous()),
            *(zeros, case.group, self.bias, case.activation, case.quantize_x),
            kernel=case.kernel,
            splits=case.splits,
            order=order,
        )

    def check(self, actual: torch.Tensor, x: torch.Tensor) -> None:
        """Rounding alone may differ: of sums in float32, and the last one to the dtype."""
        q, x_scales = quantize_rows(x) if self.case.quantize_x else (x, torch.ones(()))
        y = (q.double() @ self.dense().t()) * x_scales.double()
        size = (q.double().abs() @ self.dense().abs().t()) * x_scales.double() + 1e-30
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        exact = {"none": lambda v: v, "relu": torch.relu, "gelu": F.gelu}[self.case.activation](y)
        assert actual.shape == exact.shape
        allowed = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-21 * size
        assert ((actual.double() - exact).abs() <= allowed).all()


def kinds(*arguments, **options) -> list[Case]:
    """W4A16 with and without zero points, W4A8 with them, W2A8."""
    return [
        Case(*arguments, zeros=False, **options),
        Case(*arguments, zeros=True, **{"dtype": torch.bfloat16, **options}),
        Case(*arguments, zeros=True, quantize_x=True, **options),
        Case(*arguments, bits=2, quantize_x=True, **options),
    ]


CASES = [
    *(
        case
        for M, N, K in ((0, 3, 64), (3, 0, 64), (2, 5, 0), (1, 1, 1))
        for case in kinds(M, N, K)
    ),
    *(case for K in (7, 63, 64, 72, 200) for case in kinds(3, 33, K)),
    *(case for M, N in ((9, 64), (16, 65), (17, 130), (65, 129)) for case in kinds(M, N, 136, 32)),
    *(case for group in (16, 48, 64, 128, 2**62) for case in kinds(2, 17, 328, group)),
    *(case for group in (16, 64) for case in kinds(18, 20, 200, group)),
    # More steps than stages; splits, of which the last may be empty or one step.
    *(case for splits in (1, 2, 3, 7) for case in kinds(5, 70, 1100, 128, splits=splits)),
    *(case for splits in (1, 3) for case in kinds(66, 40, 456, 64, splits=splits)),
    *(case for splits in (2, 5) for case in kinds(3, 20, 130, 16, kernel="wide", splits=splits)),
    # 32 outputs a block, with the units and the rows of which one is left over.
    *(case for group in (16, 64) for case in kinds(8, 65, 296, group, kernel="rows8short")),
    *(case for splits in (1, 3) for case in kinds(8, 65, 1032, 128, kernel="rows8", splits=splits)),
    *(case for name in ("relu", "gelu") for case in kinds(3, 18, 80, activation=name)),
    *(case for dtype in harness.DTYPES for case in kinds(5, 18, 200, 64, dtype=dtype)),
    *(case for case in kinds(4, 24, 96, 32, bias=False)),
    # All of a tile's outputs, and a round of steps whose last is not full.
    *(case for dtype in harness.DTYPES for case in kinds(3, 66, 200, 64, dtype=dtype)),
]


WGMMA = [
    *(
        Case(M, N, K, group, zeros=zeros, dtype=dtype, activation=activation, kernel="wgmma")
        for dtype in harness.DTYPES
        for M, N, K, group, zeros, activation in (
            (1, 1, 8, None, False, "none"),
            (130, 141, 200, 64, True, "gelu"),  # more tiles than blocks, a group of part of a step
            (3, 17, 64 * 11, 128, True, "none"),  # more steps than stages, the last group half
            (33, 130, 64 * 9 - 8, None, False, "relu"),
        )
    ),
    Case(5, 20, 264, 2**62, zeros=True, kernel="wgmma"),
    Case(129, 16, 384, 192, bias=False, kernel="wgmma"),
]


@pytest.mark.parametrize("case", [*CASES, *WGMMA], ids=str)
def test_packed_linear(library, case):
    layer = Layer.make(case)
    x = torch.randn(case.M, case.K).to(case.dtype)
    order = ORDERS[(case.M + case.N + case.K) % len(ORDERS)]
    layer.check(layer.run(library, x, order), x)


@pytest.mark.parametrize("kernel", ["rows8", "rows8short", "rows16", "wide"])
def test_bits_do_not_depend_on_the_order(library, kernel):
    """The blocks that share an output arrive in any order, and are added in one."""
    for case in kinds(6, 40, 1024, 64, kernel=kernel, splits=4):
        layer, x = Layer.make(case), torch.randn(6, 1024).to(case.dtype)
        first, *others = (layer.run(library, x, order) for order in ORDERS)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", list(harness.DTYPES))
def test_misaligned_and_strided_rows(library, dtype):
    for columns, first in ((64, 0), (65, 1), (80, 8), (72, 3)):
        for case in kinds(5, 18, 64, 32, dtype=dtype):
            layer = Layer.make(case)
            x = torch.randn(5, columns + 16).to(dtype)[:, first : first + 64]
            layer.check(layer.run(library, x), x)


@pytest.mark.parametrize("dtype", list(harness.DTYPES))
def test_special_values(library, dtype):
    for case in kinds(6, 18, 72, 16, dtype=dtype):
        layer, x = Layer.make(case), torch.randn(6, 72).to(dtype)
        x[0, 3], x[1, 71], x[2, 0], x[3] = torch.nan, torch.inf, -torch.inf, 0
        y = layer.run(library, x)
        assert y[0].isnan().all()
        assert not y[1:3].isfinite().any()
        assert not y[3:].isnan().any()
        assert torch.equal(y[3], layer.bias.to(dtype))


def test_choice_of_kernel(library):
    """Kernel, splits and teams on an H200 and others."""

    def plan(M, N, K, capability=90, hopper=False, multiprocessors=132, kib=227):
        out, options = (harness.c_int64 * 4)(), map(harness.ctypes.c_int, (capability, hopper))
        sizes = (M, N, K, multiprocessors, kib * 1024)
        library.plan_packed_linear_of(*map(harness.c_int64, sizes), *options, out)
        name = {value: name for name, value in harness.PACKED_LINEAR_KERNELS.items()}[out[0]]
        assert (out[3] > 0) == (out[1] > 1)
        return name, out[1], out[2]

    # All multiprocessors have 16 warps, and nobody waits for sums of other blocks.
    assert plan(1, 16384, 16384) == ("rows8", 1, 8)
    assert plan(8, 8192, 8192) == ("rows8", 1, 16)
    assert plan(1, 4096, 4096) == ("rows8short", 1, 16)
    assert plan(16, 8192, 8192) == ("rows16", 1, 8)
    # Tiles that fill the multiprocessors badly are split.
    assert plan(1, 11008, 4096) == ("rows8", 3, 4)
    assert plan(1, 1024, 16384)[:2] == ("rows8short", 4)
    assert plan(1, 64, 64) == ("rows8short", 1, 4)  # one step cannot be split
    assert plan(1, 8192, 8192, 86, multiprocessors=84, kib=99) == ("rows8", 1, 4)
    assert plan(17, 4096, 4096)[0] == "wide"
    assert plan(4096, 4096, 4096)[:2] == ("wide", 1)
    assert plan(1, 4096, 4096, 75)[0] == "auto"
    assert plan(4096, 4096, 4096, hopper=True)[0] == "wgmma"
    names = [plan(M, 4096, 4096, hopper=True)[0] for M in (16, 512, 640)]
    assert names == ["rows16", "wide", "wgmma"]


def test_hopper_serves_whole_steps_of_16_bits(library):
    for case in kinds(300, 136, 136, 32) + kinds(300, 136, 128, 64):
        layer, x = Layer.make(case), torch.randn(300, case.K).to(case.dtype)
        layer.check(layer.run(library, x), x)
        if case.quantize_x or case.group == 32:
            with pytest.raises(harness.KernelError, match="launch failed"):
                Layer.make(replace(case, kernel="wgmma")).run(library, x)


def test_codes_do_not_depend_on_the_kernel(library):
    """Integers and scales that are powers of two have exact sums, whatever their order."""
    case = Case(70, 72, 640, 128, zeros=True, dtype=torch.bfloat16)
    layer = Layer.make(case)
    layer.scales.copy_(2.0 ** torch.randint(-3, 4, layer.scales.shape))
    layer.bias.zero_()
    x = torch.randint(-8, 9, (case.M, case.K)).bfloat16()
    expected = (x.double() @ layer.dense().t()).bfloat16()
    for kernel in ("rows8", "rows8short", "rows16", "wide", "wgmma"):
        forced = replace(layer, case=replace(case, kernel=kernel))
        assert torch.equal(forced.run(library, x), expected)
