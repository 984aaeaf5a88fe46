"""Winograd layers: every option of the float layers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from test_nn_winograd import close, float_layer
from torch import nn

from compressops.nn import WinogradConv1d, WinogradConv2d

OPTIONS = [
    {},
    {"padding": 1},
    {"padding": (2, 0), "bias": False},
    {"padding": "same"},
    {"padding": "valid", "groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 7, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": (1, 5), "padding": "same"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_of_conv2d(options: dict) -> None:
    layer = float_layer(**options)
    ours = WinogradConv2d.from_float(layer)
    assert ours.weight is layer.weight
    assert ours.bias is layer.bias
    for shape in ((2, 6, 13, 11), (6, 9, 8), (0, 6, 9, 9)):
        x = torch.randn(shape)
        expected = layer(x)
        assert ours(x).shape == expected.shape
        close(ours(x), expected)
    last = torch.randn(2, 6, 12, 12).to(memory_format=torch.channels_last)
    if layer.padding_mode == "zeros":
        assert ours(last).is_contiguous(memory_format=torch.channels_last)
    close(ours(last), layer(last))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "groups": 3},
        {"kernel_size": 7, "bias": False},
        {"padding": 2, "kernel_size": 5, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_every_option_of_conv1d(options: dict) -> None:
    layer = nn.Conv1d(**{"in_channels": 6, "out_channels": 9, "kernel_size": 3, **options})
    ours = WinogradConv1d.from_float(layer)
    for shape in ((2, 6, 31), (6, 8)):
        x = torch.randn(shape)
        close(ours(x), layer(x))


def test_constructor_is_that_of_conv2d() -> None:
    made = WinogradConv2d(4, 8, 3, padding=1, bias=False, dtype=torch.bfloat16, tile=2)
    assert isinstance(made, nn.Conv2d)
    assert (made.weight.dtype, made.bias, made.winograd.tile) == (torch.bfloat16, None, 2)
    assert "tile=2" in repr(made)
    assert "aware=True" in repr(WinogradConv1d(4, 4, 3, aware=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 2}, r"stride 1, got stride=\(2, 2\)"),
        ({"dilation": (1, 2)}, r"dilation 1, got dilation=\(1, 2\)"),
        ({"kernel_size": 1}, r"3, 5 or 7 .* got \(1, 1\)"),
        ({"kernel_size": (3, 1)}, r"got \(3, 1\)"),
        ({"kernel_size": (3, 5)}, r"got \(3, 5\)"),
        ({"tile": 3}, "'auto', 2, 4 or 6, got 3"),
        ({"tile": True}, "got True"),
        ({"kernel_size": 5, "tile": 6}, r"tile must be one of \(2, 4\) for kernel_size=\(5, 5\)"),
    ],
)
def test_what_the_op_does_not_have_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WinogradConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})


def test_from_float_takes_its_own_kind_only() -> None:
    with pytest.raises(TypeError, match="replaces a Conv2d, got a Conv1d"):
        WinogradConv2d.from_float(nn.Conv1d(4, 4, 3))
    assert not WinogradConv2d.from_float(float_layer().eval()).training
