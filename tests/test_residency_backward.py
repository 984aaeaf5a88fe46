"""Packed residency: what a backward pass needs is right, or an error, and nothing is left of it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import compressops as co
from compressops.nn import scratch


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    gc.collect()
    assert scratch.held() == 0


@pytest.mark.parametrize("residency", ["packed", "decoded"])
def test_what_the_backward_pass_needs_is_not_overwritten(residency: str) -> None:
    layer = co.nn.Int8Linear.from_float(
        nn.Linear(64, 64), None, co.Int(8), residency=residency, activation="relu"
    )
    x = torch.randn(4, 64, requires_grad=True)
    y = layer(x)
    y.sub_(10)
    with pytest.raises(RuntimeError, match="version"):
        y.sum().backward()
    layer(x).add(1).sum().backward()
    layer(x)  # nothing is left of it, also if no backward pass follows: `_nothing_left`


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_second_gradients(activation: str) -> None:
    dense = nn.Linear(8, 8)
    layer = co.nn.PackedLinear.from_float(dense, None, co.Float(), residency="packed")
    exact = copy.deepcopy(dense).requires_grad_(False)
    act = {"none": torch.square, "relu": torch.relu, "gelu": nn.functional.gelu}[activation]
    results = []
    for net in (layer, exact):
        x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
        (first,) = torch.autograd.grad(act(net(x.square())).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("number", [None, co.Int(8), co.Int(4)], ids=str)
def test_a_packed_weight_is_not_another_one_in_the_backward_pass(number: co.Int | None) -> None:
    config = (co.Float(), co.Huffman()) if number is None else (number, co.Huffman())
    first, second = (
        co.convert(nn.Sequential(nn.Linear(64, 64)), config, residency="packed") for _ in "ab"
    )
    x = torch.randn(4, 64, requires_grad=True)
    y = first(x)
    first.load_state_dict(second.state_dict())
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.sum().backward()
    first(x).sum().backward()
