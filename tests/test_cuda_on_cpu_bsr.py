"""The CUDA kernels of the block-sparse ops, run on a CPU: see tests/cuda_on_cpu."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from bsr_cases import Case, make
from cuda_on_cpu import harness
from cuda_on_cpu.bsr_linear import bsr_grad_values, bsr_multiply
from cuda_on_cpu.harness import KernelError, Plant
from test_bsr_int8_linear import QUANTIZATIONS, assert_matches
from test_bsr_int8_linear import make as make_int8
from test_bsr_linear import assert_close, finish

import compressops as co

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no C++ compiler")
ORDERS = list(harness.ORDERS)
KERNELS = ("narrow", "middle", "wide")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def library():
    return harness.build("bsr_linear")


@dataclass(frozen=True)
class Run:
    """A case with one of the kernels, its lists of blocks split so often."""

    case: Case
    kernel: str = "auto"
    splits: int = 0

    @property
    def order(self) -> str:
        return ORDERS[(self.case.m + self.case.k + self.case.n) % len(ORDERS)]


def runs(cases: list[Case]) -> list:
    """Each case in every dtype."""
    found = [
        Run(replace(case, dtype=dtype)) for case in cases for dtype in (torch.float32, *HALVES)
    ]
    bf16 = Case(70, 200, 260, dtype=torch.bfloat16)
    found += [Run(bf16, kernel, splits) for kernel in KERNELS for splits in (1, 2, 5)]
    wide = Case(5, 700, 50, (16, 32), 0.8)  # more steps than stages
    found += [Run(wide, kernel, splits) for kernel in KERNELS for splits in (0, 3)]
    return [pytest.param(run, id=f"{run.case}-{run.kernel}-{run.splits}") for run in found]


CASES = [
    *(Case(*sizes) for sizes in ((0, 16, 16), (3, 16, 0), (3, 0, 20), (1, 1, 1))),
    *(Case(m, 100, 70) for m in (1, 16, 17, 129)),
    *(Case(5, 150, 140, (b, b)) for b in (32, 64, 128)),
    *(Case(20, 88, 150, block) for block in ((48, 16), (256, 16), (16, 48), (16, 256), (144, 16))),
    *(Case(7, 64, 64, (32, 16), density, bias=False) for density in (0.0, 1.0)),
    *(Case(3, 40, 50, activation=name) for name in ("relu", "gelu")),
]
# Blocks of fewer inputs than a chunk has.
NARROW = [Case(9, 60, 50, (16, 8)), Case(9, 60, 50, (16, 24))]


def check(actual: torch.Tensor, x, dense, bias=None, activation: str = "none") -> None:
    rows, dense = x.double(), dense.double()
    expected = finish(rows @ dense.t(), bias, activation)
    size = rows.abs() @ dense.abs().t() + (0 if bias is None else bias.double().abs())
    size = 1.2 * size + (3 if activation == "gelu" else 0)
    assert_close(actual, expected, size, x.dtype, 1)


@pytest.mark.parametrize("run", runs(CASES + NARROW))
def test_bsr_linear(library, run):
    case = run.case
    x, *weight, n, bias, activation = make(case, torch.device("cpu"))
    y = bsr_multiply(
        *(library, x, weight, n, bias, activation),
        kernel=run.kernel,
        splits=run.splits,
        order=run.order,
    )
    check(y, x, co.ops.bsr_to_dense(*weight, n, case.k), bias, activation)


@pytest.mark.parametrize("run", runs([*CASES, Case(9, 60, 50, (8, 16)), Case(9, 60, 50, (24, 16))]))
def test_bsr_linear_grad_x(library, run):
    case = run.case
    _, *weight, n, _, _ = make(case, torch.device("cpu"))
    grad = torch.randn(case.m, n).to(case.dtype)
    y = bsr_multiply(
        *(library, grad, weight, case.k),
        transposed=True,
        kernel=run.kernel,
        splits=run.splits,
        order=run.order,
    )
    check(y, grad, co.ops.bsr_to_dense(*weight, n, case.k).t())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(*sizes) for sizes in ((0, 16, 16), (3, 16, 0), (1, 1, 1), (17, 100, 70))),
        *(Case(300, 70, 50, block) for block in ((16, 48), (32, 32))),
        *(Case(70, 150, 140, (b, b)) for b in (64, 128)),
    ],
    ids=str,
)
def test_bsr_linear_grad_values(library, case, dtype):
    case = replace(case, dtype=dtype)
    x, _, crow, col, n, *_ = make(case, torch.device("cpu"))
    grad = torch.randn(case.m, n).to(dtype)
    if case.m > 1 and n > 0:
        # Entries beyond the matrix are 0 whatever meets them there.
        x[1, 0], grad[0, 0] = torch.nan, torch.inf
    order = ORDERS[case.m % len(ORDERS)]
    actual = bsr_grad_values(library, grad, x, crow, col, case.block, order=order)
    with co.backend("eager"):
        expected = co.ops.bsr_linear_grad_values(
            grad.double().float(), x.float(), crow, col, case.block
        )
        size = co.ops.bsr_linear_grad_values(
            grad.abs().float(), x.abs().float(), crow, col, case.block
        )
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    bound = size[finite] * 3e-6 * (1 + case.m**0.5)
    assert ((actual - expected)[finite].abs() <= bound).all()


@pytest.mark.parametrize("how", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("case", "kernel", "splits"),
    [
        *((Case(*sizes), "auto", 0) for sizes in ((0, 16, 16), (3, 0, 20), (1, 1, 1))),
        *((Case(m, 100, 70, (16, 32)), "auto", 0) for m in (1, 17, 129)),
        *((Case(9, 150, 140, (b, b), dtype=torch.bfloat16), "auto", 0) for b in (16, 48, 128)),
        *((Case(20, 700, 50, dtype=torch.float16), kernel, 3) for kernel in KERNELS),
        (Case(3, 70, 50, activation="gelu", bias=False), "auto", 0),
    ],
    ids=str,
)
def test_bsr_int8_linear(library, case, kernel, splits, how):
    args, dense = make_int8(case, torch.device("cpu"), pack=False)
    x, *weight, scales, sums, bias, activation = args
    options = {"x_scale": None, "x_zero": None, "symmetric": True} | QUANTIZATIONS[how]
    y = bsr_multiply(
        *(library, x, weight, case.n, bias, activation, (scales, sums, *options.values())),
        kernel=kernel,
        splits=splits,
        order=ORDERS[case.m % len(ORDERS)],
    )
    assert_matches(y, args, dense, **options)


def any_order(crow: torch.Tensor) -> torch.Tensor:
    return torch.randperm(len(crow) - 1, dtype=torch.int32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_blocks_in_any_order(library, kernel, splits):
    """Blocks of a part of a tile, of several tiles and of no whole ones; the last row is ragged."""
    for block in ((16, 16), (64, 16), (48, 16), (144, 16), (256, 32)):
        case = Case(18, 100, 530, block, dtype=torch.bfloat16, activation="relu")
        x, *weight, n, bias, activation = make(case, torch.device("cpu"))
        options = {"kernel": kernel, "splits": splits, "row_order": any_order(weight[1])}
        y = bsr_multiply(library, x, weight, n, bias, activation, **options)
        check(y, x, co.ops.bsr_to_dense(*weight, n, case.k), bias, activation)
    args, dense = make_int8(Case(18, 100, 150, (32, 32)), torch.device("cpu"), pack=False)
    x, *weight, scales, sums, bias, activation = args
    options["row_order"] = any_order(weight[1])
    quantization = (scales, sums, None, None, True)
    y = bsr_multiply(library, x, weight, 150, bias, activation, quantization, **options)
    assert_matches(y, args, dense)


def test_an_order_that_is_none_stays_within_the_arrays(library):
    x, *weight, n, _, _ = make(Case(5, 100, 300, density=0.5), torch.device("cpu"))
    rows, right = len(weight[1]) - 1, bsr_multiply(library, x, weight, n)
    for bad in (-1, -(2**31), rows, 2**31 - 1, 3):
        order = torch.arange(rows, dtype=torch.int32)
        order[7] = bad
        y = bsr_multiply(library, x, weight, n, row_order=order, splits=2)
        left_out = y == 77
        assert left_out[:, 7 * 16 : 8 * 16].all()
        assert torch.allclose(y[~left_out], right[~left_out], atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_do_not_depend_on_the_order(library, kernel):
    """The blocks that share an output arrive in any order, and are added in one."""
    x, *weight, n, _, _ = make(Case(20, 1024, 40, dtype=torch.bfloat16), torch.device("cpu"))
    first, *others = (
        bsr_multiply(library, x, weight, n, kernel=kernel, splits=4, order=order)
        for order in ORDERS
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_misaligned_and_strided_rows(library, dtype):
    x, *weight, n, _, _ = make(Case(5, 64, 50, dtype=dtype), torch.device("cpu"))
    dense = co.ops.bsr_to_dense(*weight, n, 64)
    for columns, first in ((64, 0), (65, 1), (80, 8), (72, 3)):
        x = torch.randn(5, columns + 16).to(dtype)[:, first : first + 64]
        check(bsr_multiply(library, x, weight, n), x, dense)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_no_stored_block_meets_is_not_read(library, dtype, transposed):
    """NaN beyond the matrix's edges, and in x where a row of blocks stores none."""
    case = Case(9, 43, 53, density=0.5, dtype=dtype)
    _, values, crow, col, n, *_ = make(case, torch.device("cpu"))
    dense = co.ops.bsr_to_dense(values, crow, col, n, case.k)
    dense = dense.t() if transposed else dense
    x = torch.randn(case.m, dense.shape[1]).to(dtype)
    values = values.clone()
    values[col == 2, :, 11:] = torch.nan
    values[-int(crow[-1] - crow[-2]) :, 5:] = torch.nan
    sound = bsr_multiply(library, x, (values, crow, col), len(dense), transposed=transposed)
    check(sound, x, dense)
    x[4, 17] = torch.nan
    y = bsr_multiply(library, x, (values, crow, col), len(dense), transposed=transposed)
    blocks = dense[:, 16:32].abs().sum(1).view(-1) > 0
    met = torch.nn.functional.pad(blocks, (0, -len(blocks) % 16)).view(-1, 16).any(1)
    met = met.repeat_interleave(16)[: len(dense)]
    assert 0 < met.sum() < len(met)
    assert y[4, met].isnan().all()
    y[4, met] = sound[4, met]
    assert torch.equal(y, sound)


@pytest.mark.parametrize("transposed", [False, True])
def test_indices_that_are_none_stay_within_the_arrays(library, transposed):
    x, values, crow, col, n, *_ = make(Case(5, 100, 100, density=0.5), torch.device("cpu"))
    for bad in (-1, -(2**31), 7, 2**31 - 2, 2**31 - 1):
        for index in (crow, col):
            broken = index.clone()
            broken[1:4] = bad
            weight = (values, broken, col) if index is crow else (values, crow, broken)
            y = bsr_multiply(library, x, weight, n, transposed=transposed, splits=2)
            assert y.shape == (5, 100)
    broken = col.clone()
    broken[2:5] = torch.tensor([-1, 7, 2**31 - 1], dtype=torch.int32)
    bsr_grad_values(library, x, x, crow, broken, (16, 16))


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_in_any_order_and_twice(library, transposed):
    x, values, crow, col, n, *_ = make(Case(5, 100, 100, density=0.5), torch.device("cpu"))
    col = col[torch.randperm(len(col))]
    dense = co.ops.bsr_to_dense(values, crow, col, n, 100)
    dense = dense.t() if transposed else dense
    for splits in (1, 2):
        y = bsr_multiply(library, x, (values, crow, col), n, transposed=transposed, splits=splits)
        check(y, x, dense)


def test_choice_of_kernel(library):
    def plan(M, N, cells):
        out = (harness.c_int64 * 3)()
        library.plan_bsr_of(*map(harness.c_int64, (M, N, cells, 132)), out)
        return tuple(out)

    assert plan(1, 4096, 4096 * 4096 // 256 // 10) == (0, 1, 0)  # 25 steps: none is split off
    assert plan(16, 8192, 8192 * 8192 // 256 // 5) == (0, 4, 64 * 4 * 16 * 128)
    assert plan(17, 8192, 26214)[0] == 1
    assert plan(8192, 8192, 26214) == (2, 1, 0)
    assert plan(1, 64, 0)[1] == 1


LINEAR, OPERANDS, VALUES, SPLIT = (
    "bsr_linear.cuh",
    "bsr_operands.cuh",
    "bsr_grad_values.cuh",
    "split_sums.cuh",
)
PLANTS = {
    "missing __syncthreads": (
        Plant(LINEAR, "__syncthreads();  // everyone's copies", "// everyone's copies"),
        'race on shared array "shared"|never written|before its cp.async',
    ),
    "an absent block is multiplied": (
        Plant(LINEAR, "if ((groups >> group & 1) == 0) continue;\n        const", "const"),
        "never written|wrong result|race on",
    ),
    "another group's block": (
        Plant(LINEAR, "cursor.here.block, group)", "cursor.here.block, 0)"),
        'global array "values".* out of bounds|wrong result',
    ),
    "an index that leads out": (
        Plant(LINEAR, "if (next >= end) return {};", "if (next > end) return {};"),
        'global array "col_indices".* out of bounds|wrong result',
    ),
    "what lies beyond the last input": (
        Plant(LINEAR, "if (valid && k + kPiece > args.K)", "if (valid && k > args.K)"),
        "wrong result",
    ),
    "wrong fragment": (
        Plant(OPERANDS, "lane / 8 % 2));", "lane / 16));"),
        "wrong result",
    ),
    "out-of-bounds shared write": (
        Plant(OPERANDS, "return row * kPieces + (", "return (row + 1) * kPieces + ("),
        'shared array "shared".* out of bounds',
    ),
    "a block that comes first adds": (
        Plant(SPLIT, "1u) + 1 == splits", "1u) + 2 == splits"),
        "wrong result|a ticket is left",
    ),
    "the order of rows left out": (
        Plant(
            LINEAR, "bsr_row(args, (first_n + thread) / outputs)", "(first_n + thread) / outputs"
        ),
        "wrong result",
    ),
    "missing __syncwarp": (
        Plant(VALUES, "__syncwarp();  // the warp's", "// the warp's"),
        'race on shared array "shared"|never written|before its cp.async',
    ),
    "values beyond the matrix": (
        Plant(VALUES, " && first_k + column < args.K", ""),
        "wrong result",
    ),
    "a row of blocks too far": (
        Plant(VALUES, "middle + 1) <= block)", "middle + 1) < block)"),
        "wrong result",
    ),
}


@pytest.fixture(scope="module")
def planted():
    """All of them, built two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(harness.build, "bsr_linear", plant, ("CUDA_ON_CPU_BF16_ONLY",))
            for name, (plant, _) in PLANTS.items()
        }
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PLANTS)
def test_planted_mistakes_are_found(planted, name, order):
    case = Case(10, 150, 130, density=0.5, dtype=torch.bfloat16)
    x, values, crow, col, n, *_ = make(case, torch.device("cpu"))
    dense = co.ops.bsr_to_dense(values, crow, col, n, case.k)
    values[col == col.max(), :, 6:] = torch.nan
    grad = torch.randn(case.m, n).to(case.dtype)
    grad[0, -1] = x[1, -1] = torch.inf
    x[1, -1] = 1

    def verdict() -> str:
        library = planted[name]
        try:
            rows = torch.arange(len(crow) - 1, dtype=torch.int32).flip(0)
            options = {"splits": 3, "order": order, "row_order": rows}
            check(bsr_multiply(library, x, (values, crow, col), n, **options), x, dense)
            found = bsr_grad_values(library, grad, x, crow, col, case.block, order=order)
            with co.backend("eager"):
                wanted = co.ops.bsr_linear_grad_values(grad, x, crow, col, case.block)
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3, equal_nan=True)
        except KernelError as error:
            return str(error)
        except AssertionError:
            return "wrong result"
        return "right result"

    with pytest.raises(AssertionError, match=PLANTS[name][1]):
        raise AssertionError(verdict())
