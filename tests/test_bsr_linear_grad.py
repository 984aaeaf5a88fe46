"""bsr_linear's gradients: every backend against float64 on the dense weight."""

from __future__ import annotations

import pytest
import torch
from bsr_cases import Case, grid, make
from conftest import kernel_params
from test_bsr_linear import assert_close, dense_of

import compressops as co

GRAD_X = pytest.mark.parametrize("kernel", kernel_params("bsr_linear_grad_x"), indirect=True)
GRAD_VALUES = pytest.mark.parametrize(
    "kernel", kernel_params("bsr_linear_grad_values"), indirect=True
)
CHUNKS = ((600, 1, torch.float32), (530, 8, torch.float16), (1100, 3, torch.bfloat16))
CASES = [
    *(Case(m, k, n) for m in (0, 1, 7) for k in (0, 1, 40) for n in (0, 1, 50)),
    *(Case(m, 100, 70) for m in (2, 16, 33, 49)),
    *(Case(m, 150, 140, (b, b)) for m in (1, 20) for b in (1, 4, 8, 32, 128)),
    *(Case(m, 90, 70, block) for m in (6, 50) for block in ((1, 16), (16, 1), (24, 5), (64, 48))),
    *(Case(33, 64, 64, (32, 16), density) for density in (0.0, 1.0)),
    *(Case(m, 70, 50, dtype=dtype) for m in (1, 37) for dtype in (torch.float16, torch.bfloat16)),
    Case(300, 100, 70, (16, 32)),
    # more rows than are taken at a time, of few columns a block
    *(Case(m, 90, 70, (16, c), dtype=dtype) for m, c, dtype in CHUNKS),
]


@grid("bsr_linear_grad_x", CASES)
def test_gradient_of_x_matches_float64(kernel: torch.device, case: Case) -> None:
    grad = torch.randn(case.m, case.n, device=kernel).to(case.dtype)
    for pack in (False, True):
        args = make(case, kernel, pack)
        found = co.ops.bsr_linear_grad_x(grad, *args[1:4], case.k)
        assert found.dtype == case.dtype
        dense, rows = dense_of(*args), grad.cpu().double()
        assert_close(found, rows @ dense, rows.abs() @ dense.abs(), case.dtype, 1)


@grid("bsr_linear_grad_values", CASES)
def test_gradient_of_values_matches_float64(kernel: torch.device, case: Case) -> None:
    x, values, crow, col, *_ = make(case, kernel)
    grad = torch.randn(case.m, case.n, device=kernel).to(case.dtype)
    found = co.ops.bsr_linear_grad_values(grad, x, crow, col, case.block)
    assert found.dtype == torch.float32
    assert found.shape == values.shape
    ones = torch.ones_like(values, dtype=torch.float32)
    keep = co.ops.bsr_to_dense(ones, crow, col, case.n, case.k).cpu().double()
    rows, inputs = grad.cpu().double().t(), x.cpu().double()

    def blocks(dense: torch.Tensor) -> torch.Tensor:
        grid_keep = torch.zeros(len(crow) - 1, -(-case.k // case.block[1]), dtype=torch.bool)
        grid_keep[torch.arange(len(crow) - 1).repeat_interleave(crow.cpu().diff()), col.long()] = 1
        return co.ops.bsr_from_dense(dense * keep, case.block, grid_keep)[0]

    size = blocks(rows.abs() @ inputs.abs())
    assert_close(found, blocks(rows @ inputs), size, torch.float32, case.m)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dense_layer(activation: str, dtype: torch.dtype) -> None:
    case = Case(9, 40, 50, dtype=dtype, activation=activation)
    x, values, crow, col, n, bias, _ = make(case, torch.device("cpu"))
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    y = co.ops.bsr_linear(x, values, crow, col, n, bias, activation)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, grad)

    inputs, blocks, offset = (t.detach().double().requires_grad_() for t in leaves)
    before = inputs @ co.ops.bsr_to_dense(blocks, crow, col, n, 40).t() + offset
    slopes = {"none": lambda v: v, "relu": torch.relu, "gelu": torch.nn.functional.gelu}
    expected = torch.autograd.grad(slopes[activation](before), (inputs, blocks, offset), grad)
    for ours, theirs in zip(found, expected, strict=True):
        tolerance = 2e-5 if dtype == torch.float32 else 0.08
        assert torch.allclose(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("block", [(16, 1), (16, 16), (4, 5)])
def test_training_stored_blocks_is_training_under_a_mask(block: tuple[int, int]) -> None:
    """As retraining does, once its masks are final: some steps, the masked weight in float64."""
    case = Case(30, 40, 50, block, activation="gelu")
    x, values, crow, col, n, bias, activation = make(case, torch.device("cpu"))
    keep = co.ops.bsr_to_dense(torch.ones_like(values), crow, col, n, 40).double()
    weight = co.ops.bsr_to_dense(values, crow, col, n, 40).double().requires_grad_()
    offset, target = bias.double().requires_grad_(), torch.randn(30, n)
    sparse = torch.optim.AdamW([values.requires_grad_(), bias.requires_grad_()], lr=0.05)
    dense = torch.optim.AdamW([weight, offset], lr=0.05)
    for _ in range(5):
        y = co.ops.bsr_linear(x, values, crow, col, n, bias, activation)
        torch.nn.functional.mse_loss(y, target).backward()
        masked = torch.nn.functional.linear(x.double(), weight * keep, offset)
        expected = torch.nn.functional.gelu(masked)
        torch.nn.functional.mse_loss(expected, target.double()).backward()
        assert torch.allclose(y.double(), expected, atol=1e-4)
        for optimizer in (sparse, dense):
            optimizer.step()
            optimizer.zero_grad()
    found = co.ops.bsr_to_dense(values.detach(), crow, col, n, 40).double()
    assert torch.allclose(found, weight.detach() * keep, atol=1e-4)
    assert (found - (found * keep)).count_nonzero() == 0


def test_gradients_of_gradients() -> None:
    x, values, crow, col, n, bias, _ = make(Case(9, 40, 50), torch.device("cpu"))

    def second(x: torch.Tensor, values: torch.Tensor, layer) -> tuple[torch.Tensor, ...]:
        leaves = (x.requires_grad_(), values.requires_grad_())
        first = torch.autograd.grad(layer(*leaves).tanh().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    found = second(
        x.clone(), values.clone(), lambda x, v: co.ops.bsr_linear(x, v, crow, col, n, bias)
    )
    expected = second(
        x.double(),
        values.double(),
        lambda x, v: x @ co.ops.bsr_to_dense(v, crow, col, n, 40).t() + bias.double(),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=2e-4)


def test_packed_values_have_no_gradient() -> None:
    x, values, *rest = make(Case(4, 40, 50), torch.device("cpu"), pack=True)
    co.ops.bsr_linear(x.requires_grad_(), values, *rest).sum().backward()
    y = co.ops.bsr_linear(x, values.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match="bsr_linear: argument 'values'"):
        y.sum().backward()


@GRAD_X
def test_opcheck_of_grad_x(kernel: torch.device) -> None:
    args = make(Case(4, 40, 50), kernel)
    grad = torch.randn(4, 50, device=kernel, requires_grad=True)
    values = args[1].requires_grad_()
    torch.library.opcheck(
        torch.ops.compressops.bsr_linear_grad_x.default, (grad, values, *args[2:4], 40)
    )


@GRAD_VALUES
def test_opcheck_of_grad_values(kernel: torch.device) -> None:
    x, _, crow, col, *_ = make(Case(4, 40, 50), kernel)
    grad = torch.randn(4, 50, device=kernel, requires_grad=True)
    torch.library.opcheck(
        torch.ops.compressops.bsr_linear_grad_values.default,
        (grad, x.requires_grad_(), crow, col, [16, 16]),
    )


@GRAD_X
@pytest.mark.parametrize("m", [1, 20])
def test_strided_gradients(kernel: torch.device, m: int) -> None:
    x, values, crow, col, *_ = make(Case(m, 40, 50), kernel)
    grad = torch.randn(50, m, device=kernel).t()
    flat = grad.contiguous()
    found = co.ops.bsr_linear_grad_x(grad, values, crow, col, 40)
    assert torch.equal(found, co.ops.bsr_linear_grad_x(flat, values, crow, col, 40))
    wide = torch.randn(m, 80, device=kernel)
    wide[:, ::2] = x
    found = co.ops.bsr_linear_grad_values(grad, wide[:, ::2], crow, col, (16, 16))
    assert torch.equal(found, co.ops.bsr_linear_grad_values(flat, x, crow, col, (16, 16)))


def bent(bad: float, device: torch.device) -> tuple[torch.Tensor, ...]:
    """grad and x of three rows, each with a bad number in its second block's share, and a weight
    [30, 27] of the first and the last of four blocks."""
    keep = torch.tensor([[True, False], [False, True]], device=device)
    weight = torch.randn(30, 27, device=device) + 3
    grad, x = torch.randn(3, 30, device=device), torch.randn(3, 27, device=device)
    grad[1, 20] = x[2, 18] = bad
    return grad, x, *co.ops.bsr_from_dense(weight, (16, 16), keep)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@GRAD_X
def test_what_no_stored_block_meets_has_no_say_in_grad_x(kernel: torch.device, bad: float) -> None:
    grad, _, *weight = bent(bad, kernel)
    for pack in (False, True):
        weight = co.ops.bsr_linear_pack(*weight, 30, 27) if pack else weight
        found = co.ops.bsr_linear_grad_x(grad, *weight, 27)
        sound = co.ops.bsr_linear_grad_x(grad.nan_to_num(0, 0, 0), *weight, 27)
        assert not found[1, 16:].isfinite().any()
        found[1, 16:] = sound[1, 16:]
        assert torch.allclose(found, sound, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@GRAD_VALUES
def test_what_no_stored_block_meets_has_no_say_in_grad_values(
    kernel: torch.device, bad: float
) -> None:
    grad, x, _, *indices = bent(bad, kernel)
    found = co.ops.bsr_linear_grad_values(grad, x, *indices, (16, 16))
    numbers = (grad.nan_to_num(0, 0, 0), x.nan_to_num(0, 0, 0))
    sound = co.ops.bsr_linear_grad_values(*numbers, *indices, (16, 16))
    # Row 4 of the last block is grad's, column 2 is x's.
    assert not found[1, 4, :11].isfinite().any()
    assert not found[1, :14, 2].isfinite().any()
    found[1, 4], found[1, :, 2] = sound[1, 4], sound[1, :, 2]
    assert torch.allclose(found, sound, atol=1e-5)


BAD = {
    "grad": [torch.randn(3, 50).double(), torch.tensor(1.0), torch.randn(3, 70)],
    "crow_indices": [
        torch.tensor([0, 3, 5, 6, 8], dtype=torch.int32),
        torch.tensor([0, 9, 5, 6, 7], dtype=torch.int32),
        torch.tensor([0, 3, 5, 6, 7]),
    ],
    "col_indices": [
        torch.tensor([0, 1, 3, 0, 1, 2, 2], dtype=torch.int32),
        torch.tensor([0, 1, -1, 0, 1, 2, 2], dtype=torch.int32),
    ],
}


@pytest.mark.parametrize("name", [*BAD, "x", "block_size", "values", "in_features"])
@GRAD_X
def test_bad_arguments_are_named_with_their_value(kernel: torch.device, name: str) -> None:
    shared = {
        "grad": torch.randn(3, 50),
        "crow_indices": torch.tensor([0, 3, 5, 6, 7], dtype=torch.int32),
        "col_indices": torch.tensor([0, 1, 2, 0, 1, 2, 2], dtype=torch.int32),
    }
    forms = {
        co.ops.bsr_linear_grad_x: {"values": torch.randn(7, 16, 16), "in_features": 40},
        co.ops.bsr_linear_grad_values: {"x": torch.randn(3, 40), "block_size": [16, 16]},
    }
    own = {
        "values": [torch.randn(7, 16, 16).double(), torch.randn(7, 16)],
        "in_features": [-1],
        "x": [torch.randn(4, 40), torch.randn(3, 40).half(), torch.randn(40)],
        "block_size": [[16], [16, 0], [-1, 16]],
    }
    for op, more in forms.items():
        good = {**shared, **more}
        if name not in good:
            continue

        def call(arguments: dict, op=op) -> torch.Tensor:
            moved = {
                key: value.to(kernel) if isinstance(value, torch.Tensor) else value
                for key, value in arguments.items()
            }
            return op(**moved)

        call(good)
        for bad in BAD.get(name, []) + own.get(name, []):
            with pytest.raises(ValueError, match=f"{op.__name__}: argument '") as error:
                call({**good, name: bad})
            assert "got" in str(error.value)


def test_bias_has_a_gradient_beyond_float16() -> None:
    weight = co.ops.bsr_from_dense(torch.randn(16, 2), (16, 1))
    bias = torch.randn(16, requires_grad=True)
    y = co.ops.bsr_linear(torch.randn(70001, 2).half(), *weight, 16, bias)
    (found,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(found, torch.full((16,), 70001.0))
