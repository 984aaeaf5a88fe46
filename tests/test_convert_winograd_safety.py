"""convert(): a tile is taken where it is exact enough, and where float16 cannot overflow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from compressops import kernels


def test_overflow_is_bounded_by_the_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_computes_in_half", lambda input: True)
    layer = nn.Conv2d(8, 8, 3, padding=1)
    x = torch.rand(1, 8, 9, 9)
    for tile, r in ((2, 3), (4, 3)):
        bt = kernels.kernel_transform(tile, r).bt
        growth = float(max(sum(map(abs, row)) for row in bt)) ** 2
        largest = 65504 / growth / kernels.HEADROOM
        x[0, 0, 0, 0] = 0.99 * largest
        assert kernels.unsafe(layer, x, tile) is None
        x[0, 0, 0, 0] = 1.01 * largest
        assert "transformed inputs may reach 1.7e+04" in kernels.unsafe(layer, x, tile)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 4e4
    assert "transformed weights may reach" in kernels.unsafe(layer, torch.rand(1, 8, 9, 9), 4)


def test_float16_on_a_cpu_is_computed_in_float32() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1).half()
    assert kernels.unsafe(layer, 1000 * torch.rand(1, 8, 9, 9).half(), 4) is None


def test_an_example_of_zeros_does_not_make_a_tile_safe() -> None:
    layer = nn.Conv2d(64, 8, 7, padding=3)
    for example in (torch.zeros(1, 64, 30, 30), torch.randn(1, 64, 30, 30)):
        assert "times the direct convolution" in (kernels.unsafe(layer, example, 2) or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_say_nothing(value: float) -> None:
    x = torch.randn(2, 3, 12, 12)
    empty = x[:0].clone()
    x[0, 0, 3, 3] = value
    assert "nan times" in kernels.unsafe(nn.Conv2d(3, 8, 3), x, 2)
    assert "empty" in kernels.unsafe(nn.Conv2d(3, 8, 3), empty, 2)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 4, 40)])
def test_weights_of_few_bits_are_not_held_to_exactness(shape: tuple) -> None:
    layer = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign())
    assert kernels.unsafe(layer, torch.randint(0, 8, shape).float(), 4) is None
