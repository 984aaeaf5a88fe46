"""What drop-in modules make of their input before an op takes it."""

from __future__ import annotations

import pytest
import torch
from test_nn import CASES, packed_twin
from torch import nn
from torch.nn.utils import parametrize

from compressops.formats import (
    Float,
    Int,
    Ternary,
)
from compressops.nn import (
    BlockSparseConv2d,
    BlockSparseInt8Linear,
    BlockSparseLinear,
    Int4Linear,
    Int8Conv2d,
    Int8Linear,
    TernaryLinear,
)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (Int8Linear, Int(8)),
        (Int4Linear, Int(4)),
        (TernaryLinear, Ternary()),
        (BlockSparseLinear, Float()),
        (BlockSparseInt8Linear, Int(8)),
        (Int8Conv2d, Int(8)),
        (BlockSparseConv2d, Float()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_input_of_too_few_or_many_features_is_refused(kind, number) -> None:
    """The kernels' weights are padded, so that their ops would take a few less."""
    convolves = kind.source is nn.Conv2d
    module = nn.Conv2d(12, 16, 3) if convolves else nn.Linear(12, 16)
    layer, space = kind.from_float(module, number=number), (5, 5) if convolves else ()
    assert layer(torch.randn(2, 12, *space)).shape[:2] == (2, 16)
    name = "in_channels" if convolves else "in_features"
    for features in (11, 13):
        with pytest.raises(ValueError, match=rf"input must have {name} = 12 .*\[2, {features}"):
            layer(torch.randn(2, features, *space))


def test_an_input_quantizer_is_applied_and_saved() -> None:
    module, layer, _ = packed_twin(CASES[0], "float")
    module.input_quantizer = nn.Hardtanh()
    x = 3 * CASES[0].input()
    assert torch.equal(module(x), layer(x.clamp(-1, 1)))
    assert not parametrize.is_parametrized(module)
