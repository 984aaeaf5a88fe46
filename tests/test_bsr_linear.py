"""bsr_linear: every backend against float64 on the dense weight with its missing blocks as 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bsr_cases import CASES, LARGE, Case, grid, make
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co

KERNELS = kernel_params("bsr_linear")
ALL_KERNELS = pytest.mark.parametrize("kernel", KERNELS, indirect=True)
FAST_KERNELS = pytest.mark.parametrize(
    "kernel", [p for p in KERNELS if p.values[0][1] != "triton"], indirect=True
)


def dense_of(x, values, crow, col, out_features, *_rest) -> torch.Tensor:
    return co.ops.bsr_to_dense(values, crow, col, out_features, x.shape[-1]).cpu().double()


def finish(y: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    if bias is not None:
        y = y + bias.cpu().double()
    if activation == "relu":
        y = y.relu()
    return F.gelu(y) if activation == "gelu" else y


def assert_close(actual, expected, size, dtype, terms: int) -> None:
    """Sums of ``terms`` products of a total ``size`` in float32, and one rounding to the dtype."""
    assert actual.shape == expected.shape
    error = (actual.cpu().double() - expected).abs()
    sums = (4 + terms**0.5) * torch.finfo(torch.float32).eps
    bound = size * sums + (expected.abs() + 1e-6) * torch.finfo(dtype).eps
    assert (error <= bound).all(), (error / bound).max().item()


def assert_matches(actual: torch.Tensor, args: tuple) -> None:
    x, *_, bias, activation = args
    dense, rows = dense_of(*args), x.cpu().double()
    assert actual.dtype == x.dtype
    expected = finish(rows @ dense.t(), bias, activation)
    size = rows.abs() @ dense.abs().t() + (0 if bias is None else bias.cpu().double().abs())
    # The activations' slopes are at most 1.13; gelu's tail cancels.
    assert_close(actual, expected, 1.2 * size + (3 if activation == "gelu" else 0), x.dtype, 1)


@grid("bsr_linear", CASES)
def test_matches_float64(kernel: torch.device, case: Case) -> None:
    for pack in (False, True):
        args = make(case, kernel, pack)
        assert_matches(co.ops.bsr_linear(*args), args)


@FAST_KERNELS
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_matches_float64_on_large_shapes(kernel: torch.device, case: Case) -> None:
    args = make(case, kernel, pack=True)
    assert_matches(co.ops.bsr_linear(*args), args)


@given(
    st.integers(1, 70),
    st.integers(0, 80),
    st.integers(0, 80),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_random_shapes(m: int, k: int, n: int, block, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    args = make(Case(m, k, n, block, density), torch.device("cpu"), pack=bool(seed % 2))
    assert_matches(co.ops.bsr_linear(*args), args)


@ALL_KERNELS
@pytest.mark.parametrize("m", [6, 40])
def test_strided_and_batched_input(kernel: torch.device, m: int) -> None:
    x, *rest = make(Case(2 * m, 40, 50), kernel)
    whole = co.ops.bsr_linear(x, *rest)
    assert torch.equal(co.ops.bsr_linear(x.view(2, m, 40), *rest), whole.view(2, m, 50))
    assert torch.equal(co.ops.bsr_linear(x.t().contiguous().t(), *rest), whole)
    wide = torch.randn(2 * m, 80, device=kernel)
    wide[:, ::2] = x
    assert torch.equal(co.ops.bsr_linear(wide[:, ::2], *rest), whole)
    one = co.ops.bsr_linear(x[0], *rest)
    assert one.shape == (50,)
    assert torch.allclose(one, whole[0], atol=1e-5)


@ALL_KERNELS
def test_strided_weight(kernel: torch.device) -> None:
    x, values, crow, col, *rest = make(Case(20, 40, 50), kernel)
    strided = values.transpose(1, 2).contiguous().transpose(1, 2)
    twice = (crow.repeat_interleave(2)[::2], col.repeat_interleave(2)[::2])
    whole = co.ops.bsr_linear(x, values, crow, col, *rest)
    assert torch.equal(co.ops.bsr_linear(x, strided, *twice, *rest), whole)


@ALL_KERNELS
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("pack", [False, True])
def test_what_lies_beyond_the_edges_is_ignored(kernel: torch.device, m: int, pack: bool) -> None:
    case = Case(m, 40, 50, density=1.0)
    x, values, crow, col, n, bias, activation = make(case, kernel)
    whole = co.ops.bsr_linear(x, values, crow, col, n, bias, activation)
    values = values.clone()
    values[col == 2, :, 8:] = torch.nan
    values[-3:, 2:] = torch.nan
    bsr = (values, crow, col)
    bsr = co.ops.bsr_linear_pack(*bsr, n, 40) if pack else bsr
    assert torch.equal(co.ops.bsr_linear(x, *bsr, n, bias, activation), whole)


@ALL_KERNELS
@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_rows_whose_blocks_they_meet(
    kernel: torch.device, m: int, bad: float
) -> None:
    keep = torch.tensor([[True, False], [False, True]], device=kernel)
    weight = torch.randn(32, 32, device=kernel)
    bsr = co.ops.bsr_from_dense(weight, (16, 16), keep)
    x = torch.randn(m, 32, device=kernel)
    sound = co.ops.bsr_linear(x, *bsr, 32)
    x[1, 20] = bad
    for activation in ("none", "relu"):
        y = co.ops.bsr_linear(x, *bsr, 32, None, activation)
        want = (
            x[1] @ co.ops.bsr_to_dense(*bsr, 32, 32).t() if bad == bad else torch.full((32,), bad)
        )
        want[:16] = sound[1, :16]
        want = want.relu() if activation == "relu" else want
        assert torch.allclose(y[1, 16:], want[16:].to(kernel), equal_nan=True)
        others = sound.relu() if activation == "relu" else sound
        assert torch.allclose(y[1, :16], others[1, :16], atol=1e-5)
        assert torch.allclose(y[[0, 2]], others[[0, 2]], atol=1e-5)


def test_blocks_of_a_dense_weight_round_trip() -> None:
    for n, k, block in ((0, 0, (4, 4)), (5, 7, (2, 3)), (33, 65, (16, 32)), (4, 4, (8, 8))):
        keep = torch.rand(-(-n // block[0]), -(-k // block[1])) < 0.5
        bsr = co.ops.bsr_from_dense(torch.randn(n, k), block, keep)
        dense = co.ops.bsr_to_dense(*bsr, n, k)
        mask = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
        assert torch.equal(dense != 0, mask)
        packed = co.ops.bsr_linear_pack(*bsr, n, k)
        assert torch.equal(co.ops.bsr_to_dense(*packed, n, k), dense)
        again = co.ops.bsr_from_dense(dense, block)
        assert all(torch.equal(a, b) for a, b in zip(again, bsr, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support")
def test_torch_reads_the_same_blocks() -> None:
    dense = torch.randn(32, 48) * (torch.rand(2, 3) < 0.6).float().repeat_interleave(
        16, 0
    ).repeat_interleave(16, 1)
    theirs = dense.to_sparse_bsr((16, 16))
    values, crow, col = co.ops.bsr_from_dense(dense, (16, 16))
    assert torch.equal(theirs.values(), values)
    assert torch.equal(theirs.crow_indices(), crow)
    assert torch.equal(theirs.col_indices(), col)


@ALL_KERNELS
def test_opcheck(kernel: torch.device) -> None:
    for pack in (False, True):
        x, values, *rest = make(Case(4, 40, 50, activation="gelu"), kernel, pack)
        args = (x.requires_grad_(), values.requires_grad_(not pack), *rest)
        torch.library.opcheck(torch.ops.compressops.bsr_linear.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    x, *rest = make(Case(4, 40, 50), torch.device("cpu"), pack=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return co.ops.bsr_linear(x * 2, *rest) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:3]), layer(x[:3]))


def test_compiles_with_its_gradients() -> None:
    x, values, *rest = make(Case(4, 40, 50, activation="relu"), torch.device("cpu"))

    def loss(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return co.ops.bsr_linear(x, values, *rest).square().sum()

    leaves = (x.requires_grad_(), values.requires_grad_())
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        assert torch.equal(found, expected)


INT32 = torch.int32
BAD = {
    "x": [torch.randn(3, 40).double(), torch.tensor(1.0)],
    "values": [
        torch.randn(7, 16, 16).double(),
        torch.randn(7, 256),
        torch.randn(7, 0, 16),
        torch.randn(7, 16, 16, 2),
        torch.randn(7, 16, 3, 1),
    ],
    "crow_indices": [
        torch.tensor([0, 3, 5, 7], dtype=INT32),
        torch.tensor([0, 3, 5, 6, 7]),
        torch.tensor([1, 3, 5, 6, 7], dtype=INT32),
        torch.tensor([0, 3, 5, 6, 8], dtype=INT32),
        torch.tensor([0, 9, 5, 6, 7], dtype=INT32),
        torch.tensor([0, -3, 5, 6, 7], dtype=INT32),
    ],
    "col_indices": [
        torch.tensor([0, 1, 2, 0, 1, 2], dtype=INT32),
        torch.tensor([0, 1, 2, 0, 1, 2, 2]),
        torch.tensor([0, 1, 3, 0, 1, 2, 2], dtype=INT32),
        torch.tensor([0, 1, -1, 0, 1, 2, 2], dtype=INT32),
        torch.tensor([0, 1, -(2**31), 0, 1, 2, 2**31 - 1], dtype=INT32),
    ],
    "bias": [torch.zeros(4), torch.zeros(50, dtype=torch.int64)],
    "activation": ["swish", ""],
    "out_features": [-1],
}


def good_arguments() -> dict:
    return {
        "x": torch.randn(3, 40),
        "values": torch.randn(7, 16, 16),
        "crow_indices": torch.tensor([0, 3, 5, 6, 7], dtype=INT32),
        "col_indices": torch.tensor([0, 1, 2, 0, 1, 2, 2], dtype=INT32),
        "out_features": 50,
        "bias": torch.zeros(50),
        "activation": "none",
    }


@pytest.mark.parametrize("name", BAD)
@ALL_KERNELS
def test_bad_arguments_are_named_with_their_value(kernel: torch.device, name: str) -> None:
    def on_device(value):
        return value.to(kernel) if isinstance(value, torch.Tensor) else value

    good = {key: on_device(value) for key, value in good_arguments().items()}
    co.ops.bsr_linear(**good)
    for bad in BAD[name]:
        with pytest.raises(ValueError, match="bsr_linear: argument '") as error:
            co.ops.bsr_linear(**{**good, name: on_device(bad)})
        assert "got" in str(error.value)


@pytest.mark.parametrize("name", ["values", "crow_indices", "col_indices", "out_features"])
def test_pack_refuses_what_is_no_weight(name: str) -> None:
    good = good_arguments()
    good = {key: good[key] for key in ("values", "crow_indices", "col_indices", "out_features")}
    unsorted = [[0, 2, 1, 0, 1, 2, 2], [0, 0, 2, 0, 1, 2, 2], [0, 1, 2, 1, 0, 2, 2]]
    bads = list(BAD[name]) + ([torch.randn(7, 16, 16, 1)] if name == "values" else [])
    if name == "col_indices":
        bads += [torch.tensor(columns, dtype=INT32) for columns in unsorted]
    for bad in bads:
        with pytest.raises(ValueError, match="bsr_linear_pack: argument '") as error:
            co.ops.bsr_linear_pack(**{**good, name: bad}, in_features=40)
        assert "got" in str(error.value)


def test_blocks_stored_twice_add_up() -> None:
    good = good_arguments()
    good["col_indices"] = torch.tensor([0, 0, 2, 1, 1, 2, 2], dtype=INT32)
    args = tuple(good.values())
    assert_matches(co.ops.bsr_linear(*args), args)
