"""round_rows' CUDA kernel on a CPU: bit for bit what the reference says, within its arrays."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_on_cpu import harness
from cuda_on_cpu.harness import KernelError, Plant

from compressops.ops.round_rows import round_rows_reference

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# On both sides of each number of lanes that share a row, and of their 16 elements.
COLUMNS = (1, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 129, 512, 513, 1040)


@pytest.fixture(scope="module")
def library():
    return harness.build("round_rows")


def assert_same(actual: torch.Tensor, x: torch.Tensor, symmetric: bool) -> None:
    expected = round_rows_reference(x, symmetric)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(actual.signbit()[numbers], expected.signbit()[numbers])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_length(library, dtype: torch.dtype, symmetric: bool) -> None:
    for order, (rows, columns) in zip(
        itertools.cycle(harness.ORDERS), itertools.product((0, 1, 5, 70), COLUMNS), strict=False
    ):
        x = (torch.randn(rows, columns) * 10.0 ** torch.randint(-3, 4, (rows, 1))).to(dtype)
        y = harness.round_rows(library, x, symmetric, max_blocks=3, order=order)
        assert_same(y, x, symmetric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_attention_and_other_strides(library, dtype: torch.dtype) -> None:
    wide = torch.randn(2, 5, 4 * 24 + 8).to(dtype)
    heads = wide[..., 8:].unflatten(2, (4, 24)).transpose(1, 2)
    cases = [
        *(heads, heads[:, :1, 2:3], wide[:, ::2, 3:50], wide[0, 0].expand(3, 2, 104), wide[0, 0]),
        *(wide[..., 5:6], wide[..., 16:80], wide[..., 1:], wide[:0], wide[..., :0]),
    ]
    for x, symmetric in itertools.product(cases, (True, False)):
        assert_same(harness.round_rows(library, x, symmetric), x, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(library, dtype: torch.dtype, symmetric: bool) -> None:
    most = torch.finfo(dtype).max
    values = [0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, most, -most, 1e-39]
    x = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).to(dtype)
    assert_same(harness.round_rows(library, x, symmetric), x, symmetric)
    x = torch.nn.functional.pad(x, (20, 30))
    assert_same(harness.round_rows(library, x, symmetric), x, symmetric)


FILE = "round_rows.cuh"
PLANTS = {
    "a row too many": (
        Plant(FILE, "row < count ? args.K : 0", "row <= count ? args.K : 0"),
        'global array ".*out of bounds',
    ),
    "vectors at any address": (
        Plant(FILE, "bool x_aligned = misalignment(args.x, 16) == 0", "bool x_aligned = true"),
        'global array "x".* is misaligned',
    ),
    "vectors at any stride": (
        Plant(FILE, "|| aligned(args.rows.strides[i])", "|| true"),
        'global array "x".* is misaligned',
    ),
    "vectors to rows of any length": (
        Plant(FILE, "== 0 && aligned(args.K)", "== 0"),
        'global array "y".* is misaligned',
    ),
    "a maximum of half of the lanes": (
        Plant("warp.cuh", "int lanes = kLanes / 2;", "int lanes = kLanes / 4;"),
        "wrong result",
    ),
    "past the end of the dtype": (
        Plant(FILE, "rounded > largest ? largest", "rounded > largest ? rounded"),
        "wrong result",
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_mistakes_are_found(name: str) -> None:
    plant, message = PLANTS[name]
    planted, said = harness.build("round_rows", plant), []
    wide = torch.randn(7, 208, dtype=torch.float16)
    most = torch.finfo(torch.float16).max
    ends = torch.tensor([most, -most, most / 1.001, -most / 1.004, most / 3], dtype=torch.float16)
    past = torch.cartesian_prod(ends, ends)
    tall = torch.randn(7, 203, dtype=torch.float16)
    for x in (torch.randn(5, 90), wide[:, 1:193], tall[:, :160], torch.randn(3, 40), past):
        try:
            right = torch.equal(
                harness.round_rows(planted, x, False), round_rows_reference(x, False)
            )
            said += [] if right else ["wrong result"]
        except KernelError as error:
            said.append(str(error))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("; ".join(said))
