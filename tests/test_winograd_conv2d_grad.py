"""winograd_conv2d_grad: the gradient of the weights in the Winograd domain, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params

from compressops import backends, schema
from compressops.ops import (
    winograd_conv2d,
    winograd_conv2d_grad,
    winograd_conv2d_weight_grad,
)
from compressops.ops.winograd_transform import SUPPORTED

KERNELS = kernel_params("winograd_conv2d_grad")
# H, W, C, K, groups, padding, N
SHAPES = (
    (1, 1, 1, 1, 1, (3, 3), 1),
    (9, 11, 5, 7, 1, (1, 1), 2),
    (19, 18, 16, 32, 1, (0, 1), 2),
    (14, 14, 32, 48, 2, (1, 1), 1),
    (28, 30, 35, 70, 5, (2, 0), 1),
    (40, 41, 20, 16, 1, (1, 9), 3),
    (8, 8, 64, 64, 1, (1, 1), 20),
)


def arguments(shape, r: int, flat: bool, dtype: torch.dtype, device) -> tuple | None:
    H, W, C, K, groups, padding, N = shape
    rh = 1 if flat else r
    out = (H + 2 * padding[0] - rh + 1, W + 2 * padding[1] - r + 1)
    if min(out) < 1:
        return None
    x = torch.randn(N, C, H, W, device=device).to(dtype)
    grad = torch.randn(N, K, *out, device=device).to(dtype)
    return x, grad, (rh, r), padding, groups


def direct(x, grad, kernel_size, padding, groups) -> torch.Tensor:
    weight = x.new_zeros(grad.shape[1], x.shape[1] // groups, *kernel_size)
    return torch.ops.aten.convolution_backward(
        *(grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], groups),
        [False, True, False],
    )[1]


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("flat", [False, True], ids=("2d", "1d"))
@pytest.mark.parametrize(("tile", "r"), SUPPORTED)
@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_parity_with_float64(kernel, tile: int, r: int, flat: bool) -> None:
    for shape in SHAPES:
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            given = arguments(shape, r, flat, dtype, kernel)
            if given is None:
                continue
            x, grad, *rest = given
            exact = direct(x.double(), grad.double(), *rest)
            ours = winograd_conv2d_weight_grad(x, grad, *rest, tile)
            assert ours.dtype == dtype
            assert ours.shape == exact.shape
            error = relative_error(ours, exact)
            assert error < bound, f"{shape} {dtype}: {error:.2e}"


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_threads_share_a_large_sum(kernel) -> None:
    # Two sums of 37.7 MB would be too much.
    x, grad, *rest = arguments((9, 30, 512, 512, 1, (1, 1), 6), 3, False, torch.float32, kernel)
    exact = direct(x.double(), grad.double(), *rest)
    assert relative_error(winograd_conv2d_weight_grad(x, grad, *rest), exact) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_any_strides(kernel) -> None:
    x, grad, *rest = arguments((13, 10, 20, 18, 1, (1, 1), 2), 3, False, torch.float32, kernel)
    expected = winograd_conv2d_grad(x, grad, *rest)
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda t: torch.stack([t, t], -1)[..., 1],
    ):
        ours = winograd_conv2d_grad(change(x), change(grad), *rest)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    expanded = grad[:, :1].expand_as(grad)
    torch.testing.assert_close(
        winograd_conv2d_grad(x, expanded, *rest),
        winograd_conv2d_grad(x, expanded.contiguous(), *rest),
    )


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("sizes", [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_empty(kernel, sizes) -> None:
    N, C, K = sizes
    x, grad = torch.randn(N, C, 8, 8, device=kernel), torch.randn(N, K, 8, 8, device=kernel)
    out = winograd_conv2d_grad(x, grad, (3, 3), (1, 1))
    assert out.shape == (36, K, C)
    assert not out.any()


def test_float64_is_exact_to_rounding() -> None:
    x, grad, *rest = arguments(SHAPES[1], 3, False, torch.float64, "cpu")
    with backends.backend("eager"):
        ours = winograd_conv2d_weight_grad(x, grad, *rest)
    torch.testing.assert_close(ours, direct(x, grad, *rest), rtol=1e-11, atol=1e-11)


def test_the_op_takes_it_for_its_own_gradient() -> None:
    x = torch.randn(2, 16, 12, 12)
    weight = torch.randn(24, 16, 3, 3, requires_grad=True)
    y = winograd_conv2d(x, weight, None, 1, tile=4)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = direct(x.double(), grad.double(), (3, 3), (1, 1), 1)
    assert relative_error(weight.grad, exact) < 1e-5


def test_it_is_not_differentiable_and_says_so() -> None:
    x, grad, *rest = arguments(SHAPES[1], 3, False, torch.float32, "cpu")
    u = winograd_conv2d_grad(x.requires_grad_(), grad, *rest)
    with pytest.raises(NotImplementedError, match="winograd_conv2d_grad is not differentiable"):
        u.sum().backward()


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float16):
        x, grad, *rest = arguments(SHAPES[3], 3, False, dtype, "cpu")
        torch.library.opcheck(schema.public_op("winograd_conv2d_grad"), (x, grad, *rest))


def test_compiles_as_one_graph() -> None:
    x, grad, *rest = arguments(SHAPES[2], 3, False, torch.float32, "cpu")
    compiled = torch.compile(winograd_conv2d_weight_grad, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, grad, *rest), winograd_conv2d_weight_grad(x, grad, *rest)
    )


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 8)}, r"'x'.*\[2, 4, 8\]"),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.int32)}, r"'x'.*[Ii]nt"),
        ({"grad": torch.zeros(2, 6, 8, 7)}, r"'grad'.*\[2, 6, 8, 7\]"),
        ({"grad": torch.zeros(2, 6, 8, 8).half()}, r"'grad'.*[Hh](alf|oat16)|'grad'.*float16"),
        ({"kernel_size": (3, 2)}, r"'kernel_size'.*3"),
        ({"padding": (-1, 1)}, r"'padding'.*-1"),
        ({"groups": 3}, r"'groups'.*3"),
        ({"tile": 3}, r"'tile'.*3"),
    ],
)
def test_bad_input_is_named(kernel, change: dict, message: str) -> None:
    given = {
        "x": torch.zeros(2, 4, 8, 8),
        "grad": torch.zeros(2, 6, 8, 8),
        "kernel_size": (3, 3),
        "padding": (1, 1),
        "groups": 1,
        "tile": 4,
    } | change
    given = {k: v.to(kernel) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        winograd_conv2d_grad(**given)
