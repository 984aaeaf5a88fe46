"""winograd_conv2d: opcheck, compiled graphs, vmap and torch.func."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from winograd_cases import (
    ALL_KERNELS,
    Case,
    interpreted,
    make,
)

import compressops as co


@ALL_KERNELS
def test_opcheck(kernel: torch.device) -> None:
    settings = (
        (Case(2, 4, 6, 5, 6, groups=2, activation="gelu"), True),
        (Case(1, 3, 5, 5, 6, channels_last=True, activation="relu"), True),
        (Case(1, 3, 5, 1, 9, flat=True, padding=(0, 0), tile=2, bias=False), False),
    )
    for case, needs_grad in settings[-1:] if interpreted() else settings:
        x, weight, bias = make(case, kernel)
        packed = co.ops.winograd_conv2d_pack(weight, case.groups, case.tile)
        rest = (packed, bias, list(case.padding), case.groups, case.activation, case.tile)
        if kernel.type == "cpu":
            torch.library.opcheck(
                torch.ops.compressops_native.winograd_conv2d.default,
                (x, weight, *rest),
                test_utils=("test_schema", "test_faketensor"),
            )
        args = (x.requires_grad_(needs_grad), weight.requires_grad_(needs_grad), *rest)
        torch.library.opcheck(torch.ops.compressops.winograd_conv2d.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    x, weight, bias = make(Case(5, 4, 6, 9, 8, groups=2))
    packed = co.ops.winograd_conv2d_pack(weight, 2, 4)

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        first = co.ops.winograd_conv2d(x * 2, weight, bias, 1, 2, "gelu")
        return first + co.ops.winograd_conv2d(x, weight, None, 1, 2, tile=4, transformed=packed)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((5, 4, 9, 8), (7, 4, 17, 30)):
        x = torch.randn(size)
        assert torch.equal(compiled(x, weight), layer(x, weight))
    last = x.contiguous(memory_format=torch.channels_last)
    assert compiled(last, weight).stride() == layer(last, weight).stride()
    x.requires_grad_(), weight.requires_grad_()
    y = compiled(x, weight)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(layer(x, weight), (x, weight), grad)
    for a, b in zip(torch.autograd.grad(y, (x, weight), grad), expected, strict=True):
        # Threads add up in any order.
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_one_graph_serves_all_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    weight = torch.randn(6, 4, 3, 3)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return co.ops.winograd_conv2d(x, weight, None, 1)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in ((5, 4, 19, 18), (7, 4, 17, 30), (13, 4, 64, 65)):
        compiled(torch.randn(size))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    x, weight = torch.randn(3, 2, 4, 6, 7), torch.randn(3, 5, 4, 3, 3)

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return co.ops.winograd_conv2d(x, weight, None, 1, tile=4)

    expected = torch.stack([layer(a, b) for a, b in zip(x, weight, strict=True)])
    assert torch.allclose(torch.vmap(layer)(x, weight), expected, atol=1e-5)


def test_torch_func_goes_through_the_reference() -> None:
    x, weight, _ = make(Case())

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return co.ops.winograd_conv2d_reference(x, weight, None, 1).square().sum()

    weight.requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight), weight)
    assert torch.allclose(torch.func.grad(loss)(weight.detach()), expected, atol=1e-4)
