"""round_rows: every backend gives the values of the codes that int8_linear multiplies."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops.compress.activations import RowQuantizer
from compressops.ops.round_rows import round_rows_reference

ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params("round_rows"), indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def exact(x: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """By the formulas, row by row in float64, with their float32 factors."""
    rows = []
    for row in x.double().cpu().reshape(-1, x.shape[-1]):
        low, high = min(0.0, row.min().item()), max(0.0, row.max().item())
        if not row.isfinite().all():
            rows.append(torch.full_like(row, torch.nan))
            continue
        if symmetric:
            reach, levels, zero, least, most = max(-low, high), 127.0, 0, -127, 127
        else:
            reach = float(torch.tensor(high).float() * 0.5 - torch.tensor(low).float() * 0.5)
            levels, least, most = 127.5, -128, 127
        inverse = (torch.tensor(levels) / torch.tensor(reach)).float() if reach else torch.zeros(())
        if not symmetric:
            lowest = (torch.tensor(low).float() * inverse).nan_to_num(nan=0.0)
            zero = -128 - int(lowest.clamp(min=-255).round())
        scaled = (row.float() * inverse).nan_to_num(nan=0.0)
        codes = (scaled.round() + zero).clamp(least, most)
        scale = torch.tensor(reach).float() / torch.tensor(levels)
        most = torch.finfo(x.dtype).max
        rows.append(((codes - zero) * scale).clamp(-most, most).double())
    return torch.stack(rows).view(x.shape).to(x.dtype)


@ALL_KERNELS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_the_codes(kernel, dtype: torch.dtype, symmetric: bool) -> None:
    for rows, columns in itertools.product((1, 5), (1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100)):
        x = torch.randn(rows, columns) * 10.0 ** torch.randint(-3, 4, (rows, 1))
        x = x.to(dtype)
        y = co.ops.round_rows(x.to(kernel), symmetric)
        assert (y.dtype, y.shape, y.device.type) == (dtype, x.shape, kernel.type)
        assert torch.equal(y.cpu(), exact(x, symmetric))
        assert not (y.cpu().signbit() & (y.cpu() == 0)).any()


@ALL_KERNELS
@pytest.mark.parametrize("symmetric", [True, False])
def test_special_values(kernel, symmetric: bool) -> None:
    inf, nan, tiny, huge = torch.inf, torch.nan, 1e-45, 3e38
    values = [0.0, -0.0, 1.0, -1.0, inf, -inf, nan, tiny, -tiny, huge, -huge, 1e-39, 0.5]
    rows = torch.tensor(list(itertools.product(values, values)))
    x = torch.nn.functional.pad(rows, (1, 15))
    y = co.ops.round_rows(x.to(kernel), symmetric).cpu()
    assert torch.equal(y.isnan(), (~x.isfinite().all(1, keepdim=True)).expand_as(x))
    expected = round_rows_reference(x, symmetric)
    assert torch.equal(y.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


@ALL_KERNELS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_the_end_of_the_dtype_stay_finite(kernel, dtype: torch.dtype, symmetric: bool):
    most = torch.finfo(dtype).max
    ends = torch.tensor([most, -most, most / 1.001, -most / 1.004, most / 3, -1.0, 0.0]).to(dtype)
    x = torch.cartesian_prod(ends, ends)
    y = co.ops.round_rows(x.to(kernel), symmetric).cpu()
    assert y.isfinite().all()
    assert torch.equal(y, exact(x, symmetric))
    assert y.abs().max() == most


@ALL_KERNELS
def test_strides_and_empty_tensors(kernel) -> None:
    wide = torch.randn(2, 5, 4 * 24, device=kernel)
    heads = wide.view(2, 5, 4, 24).transpose(1, 2)
    cases = {
        "heads": heads,
        "of one": heads[:, :1, 2:3],
        "every other": wide[:, ::2, 3:50:2],
        "transposed": wide.transpose(1, 2),
        "expanded": wide[0, 0].expand(3, 2, 96),
        "one row": wide[0, 0],
        "one column": wide[..., 5:6],
        "backwards": wide.flip(1)[:, 1:],
        "many dimensions": wide.view(2, 1, 5, 2, 2, 3, 8).permute(4, 0, 3, 1, 5, 2, 6),
    }
    for name, x in cases.items():
        for symmetric in (True, False):
            y = co.ops.round_rows(x, symmetric)
            assert y.is_contiguous(), name
            assert torch.equal(y.cpu(), exact(x.cpu(), symmetric)), name
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)):
        x = torch.empty(shape, device=kernel)
        assert co.ops.round_rows(x).shape == x.shape


# The interpreter takes minutes for so many rows.
@pytest.mark.parametrize(
    "kernel", [p for p in kernel_params("round_rows") if "triton" not in p.id], indirect=True
)
def test_many_rows_and_long_ones(kernel) -> None:
    for shape in ((3001, 64), (3, 40_001)):
        x = torch.randn(shape, device=kernel)
        expected = round_rows_reference(x.cpu(), False)
        assert torch.equal(co.ops.round_rows(x, False).cpu(), expected)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.booleans())
def test_any_floats(values: list[float], symmetric: bool) -> None:
    x = torch.tensor(values)[None]
    y, expected = co.ops.round_rows(x, symmetric), round_rows_reference(x, symmetric)
    assert torch.equal(y.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))
    if x.isfinite().all() and x.abs().max() < 1e38:
        # Codes are a scale apart; the largest float32 sums rounding errors of two products.
        step = max(x.max().item(), 0.0) - min(x.min().item(), 0.0)
        step = step / 255 if not symmetric else x.abs().max().item() / 127
        assert ((y - x).abs() <= step * 1.01 + 1e-37).all()


@ALL_KERNELS
def test_gradients_pass(kernel) -> None:
    x = torch.randn(3, 4, 16, device=kernel, requires_grad=True)
    grad = torch.randn(3, 4, 16, device=kernel)
    co.ops.round_rows(x, False).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck_and_compile(symmetric: bool) -> None:
    x = torch.randn(2, 3, 4, 17).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.compressops.round_rows, (x, symmetric))
    compiled = torch.compile(lambda x: co.ops.round_rows(x * 2, symmetric) + 1, fullgraph=True)
    assert torch.equal(compiled(x), co.ops.round_rows(x * 2, symmetric) + 1)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.int8), torch.zeros(()), torch.zeros(2).double()]
)
def test_bad_arguments_are_named(bad: torch.Tensor, native: bool, backend: str) -> None:
    op = torch.ops.compressops_native.round_rows if native else co.ops.round_rows
    with co.backend(backend), pytest.raises(ValueError, match="round_rows: argument 'x' must be"):
        op(bad)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_quantizer_of_recipes_rounds_so(dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    y = RowQuantizer(co.Int(8, symmetric=symmetric))(x)
    assert torch.equal(y, round_rows_reference(x.detach(), symmetric))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
