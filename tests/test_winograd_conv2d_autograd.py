"""winograd_conv2d: gradients of every backend, and those of the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from winograd_cases import ALL_KERNELS, ALL_TILES, Case, call, interpreted, make

import compressops as co
from compressops.ops.winograd_conv2d import _input_gradient
from compressops.ops.winograd_transform import SUPPORTED


def gradients(y: torch.Tensor, inputs: tuple, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, inputs, grad)


@ALL_KERNELS
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradient(kernel: torch.device, activation: str) -> None:
    cases = [
        Case(2, 6, 9, 33, 31, groups=3, activation=activation),
        Case(1, 20, 18, 40, 70, padding=(0, 2), tile=2, activation=activation),
        Case(1, 3, 4, 47, 45, padding=(3, 1), activation=activation),  # more than r − 1
        Case(1, 4, 5, 6, 140, 5, True, 4, (0, 1), activation=activation),
        Case(2, 8, 8, 44, 44, tile=6, dtype=torch.bfloat16, activation=activation),
    ]
    for case in cases[2:3] if interpreted() else cases:
        inputs = tuple(t.requires_grad_() for t in make(case, kernel))
        wide = tuple(t.detach().cpu().double().requires_grad_() for t in inputs)
        exact = F.conv2d(*wide, padding=case.padding, groups=case.groups)
        y = call(*inputs, case)
        grad = torch.randn(exact.shape)
        if activation == "relu":
            grad = torch.where(exact.abs() < 1e-2, 0.0, grad)  # where the sign may round away
            exact = exact.relu()
        elif activation == "gelu":
            exact = F.gelu(exact)
        actual = gradients(y, inputs, grad.to(y))
        expected = gradients(exact, wide, grad.to(y.dtype).double())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[case.dtype]
        for ours, exact_one, like in zip(actual, expected, inputs, strict=True):
            assert ours.dtype == like.dtype
            assert ours.shape == like.shape
            error = (ours.cpu().double() - exact_one).abs().max() / exact_one.abs().max()
            assert error < tolerance, (case, error)


@pytest.mark.parametrize("flat", [False, True])
@ALL_TILES
def test_input_gradient_in_the_winograd_domain(tile: int, r: int, flat: bool) -> None:
    rh = 1 if flat else r
    for padding in ((0, 0), (rh - 1, r - 1), (0, 1)):
        x = torch.randn(1, 4, 12, 13, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 2, rh, r, dtype=torch.float64)
        y = F.conv2d(x, weight, None, 1, padding, 1, 2)
        grad = torch.randn_like(y)
        (expected,) = gradients(y, (x,), grad)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-3)):
            actual = _input_gradient(grad.to(dtype), weight.to(dtype), padding, 2, tile)
            assert torch.allclose(actual.double(), expected, atol=tolerance, rtol=0)


def small(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("flat", [False, True])
def test_gradcheck(activation: str, flat: bool) -> None:
    inputs = (small(1, 2, 3, 4), small(2, 1, 1 if flat else 3, 3), small(2))
    settings = ((0, 1), 2, activation, 4)
    with co.backend("eager"):
        assert torch.autograd.gradcheck(
            lambda *tensors: co.ops.winograd_conv2d(*tensors, *settings), inputs
        )
    assert torch.autograd.gradcheck(
        lambda *tensors: co.ops.winograd_conv2d_reference(*tensors, *settings), inputs
    )


def test_second_derivatives() -> None:
    inputs = (small(1, 1, 2, 3), small(2, 1, 3, 3), small(2))
    settings = (1, 1, "gelu", 2)
    with co.backend("eager"):
        assert torch.autograd.gradgradcheck(
            lambda *tensors: co.ops.winograd_conv2d(*tensors, *settings), inputs
        )


@ALL_KERNELS
def test_second_derivatives_in_float32(kernel: torch.device) -> None:
    """Where the first ones may be another kernel's, as a penalty on gradients needs them."""
    if interpreted():
        pytest.skip("the gradients are direct there")
    case = Case(2, 6, 8, 44, 45, groups=2)
    tensors = make(case, kernel)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = tuple(t.to(dtype).requires_grad_() for t in tensors)
        y = call(*inputs, case) if dtype == torch.float32 else F.conv2d(*inputs, 1, 1, 1, 2)
        first = torch.autograd.grad(y.square().mean(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


def test_fused_gelu_of_the_op_itself_has_a_gradient() -> None:
    case = Case(activation="gelu")
    x, weight, bias = (t.requires_grad_() for t in make(case))
    packed = co.ops.winograd_conv2d_pack(weight, 1, 4)
    op = torch.ops.compressops.winograd_conv2d
    fused = op(x, weight, packed, bias, [1, 1], 1, "gelu", 4)
    unfused = F.gelu(op(x, weight, packed, bias, [1, 1], 1, "none", 4))
    grad = torch.randn_like(fused)
    for a, b in zip(
        gradients(fused, (x, weight, bias), grad),
        gradients(unfused, (x, weight, bias), grad),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_transformed_weights_have_no_gradient_of_their_own() -> None:
    x, weight, _ = make(Case())
    packed = co.ops.winograd_conv2d_pack(weight.requires_grad_(), 1, 4)
    assert not packed.requires_grad
    y = co.ops.winograd_conv2d(x, weight, tile=4, transformed=packed.requires_grad_())
    with pytest.raises(NotImplementedError, match="argument 'transformed' has no gradient"):
        y.sum().backward()


def test_reference_is_the_op_in_float64_and_differentiates_through_the_transforms() -> None:
    for tile, r in SUPPORTED:
        case = Case(2, 4, 6, 9, 10, r, tile=tile, groups=2, activation="gelu")
        x, weight, bias = (t.double().requires_grad_() for t in make(case))
        y = co.ops.winograd_conv2d_reference(x, weight, bias, 1, 2, "gelu", tile)
        exact = F.gelu(F.conv2d(x, weight, bias, 1, 1, 1, 2))
        assert torch.allclose(y, exact, atol=1e-10, rtol=0)
        grad = torch.randn_like(y)
        for a, b in zip(
            gradients(y, (x, weight, bias), grad),
            gradients(exact, (x, weight, bias), grad),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-9, rtol=0)
    # In float32 its gradient is that of the rounded algorithm, not that of direct convolution.
    x, weight, _ = make(Case(1, 64, 8, 12, 12, tile=6))
    weight.requires_grad_()
    y = co.ops.winograd_conv2d_reference(x, weight, None, 1, 1, "none", 6)
    assert "Convolution" not in type(y.grad_fn).__name__
    last = x.contiguous(memory_format=torch.channels_last)
    z = co.ops.winograd_conv2d_reference(last, weight, None, 1, 1, "none", 6)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, z, atol=1e-4)
