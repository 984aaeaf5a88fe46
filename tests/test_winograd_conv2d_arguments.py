"""winograd_conv2d: bad arguments are errors that name them."""

from __future__ import annotations

import pytest
import torch
from winograd_cases import ALL_KERNELS, OP

import compressops as co


def bad_arguments() -> dict:
    x, weight = torch.randn(2, 4, 6, 7), torch.randn(6, 2, 3, 3)
    packed = co.ops.winograd_conv2d_pack(weight, 2, 4)
    return {
        "x": [x[0], x.long(), x[:, :, :0], x[:, :, :2], x[..., :2], x[..., :0]],
        "weight": [
            *(weight[0], weight.half(), weight.long(), torch.randn(6, 4, 3, 3)),
            *(torch.randn(6, 2, 2, 2), torch.randn(6, 2, 3, 1), torch.randn(6, 2, 5, 3)),
        ],
        "transformed": [
            *(packed[:, :, :16], packed.half(), packed.double(), packed.flatten()),
            co.ops.winograd_conv2d_pack(weight, 2, 2),
        ],
        "bias": [
            torch.zeros(5),
            torch.zeros(6, 1),
            torch.zeros(6, dtype=torch.int64),
            torch.zeros(6).double(),
        ],
        "padding": [[-1, 0], [0, -1], [1], [1, 1, 1], [2**63 - 1, 0], [0, 2**62 + 1]],
        "groups": [0, -1, 3, 8],
        "activation": ["swish", ""],
        "tile": [0, 1, 3, 5, 6 + 2**32],
    }


def good_arguments() -> dict:
    weight = torch.randn(6, 2, 3, 3)
    return {
        "x": torch.randn(2, 4, 6, 7),
        "weight": weight,
        "transformed": co.ops.winograd_conv2d_pack(weight, 2, 4),
        "bias": torch.zeros(6),
        "padding": [0, 0],
        "groups": 2,
        "activation": "none",
        "tile": 4,
    }


@pytest.mark.parametrize("name", list(bad_arguments()))
@ALL_KERNELS
def test_bad_arguments_are_named_with_their_value(kernel: torch.device, name: str) -> None:
    if kernel.type != "cpu":
        pytest.skip("the arguments are made on a CPU")
    op = torch.ops.compressops.winograd_conv2d
    good = good_arguments()
    op(**good)
    for bad in bad_arguments()[name]:
        with pytest.raises(ValueError, match=f"{OP}: argument '") as error:
            op(**{**good, name: bad})
        assert "got" in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: co.ops.winograd_conv2d(x[0], w), "'x' must be .* shape \\[4, 6, 7\\]"),
        (
            lambda x, w: co.ops.winograd_conv2d(x, w, padding="same"),
            "'padding' must be .* got same",
        ),
        (lambda x, w: co.ops.winograd_conv2d(x, w, padding=1.5), "'padding' must be .* got 1.5"),
        (lambda x, w: co.ops.winograd_conv2d(x, w, padding=(1,)), "'padding' must be .* got"),
        (lambda x, w: co.ops.winograd_conv2d(x, w, tile="best"), "'tile' must be .* got 'best'"),
        (lambda x, w: co.ops.winograd_conv2d(x, w, tile=8), "'tile' must be one of .* got 8"),
        (
            lambda x, w: co.ops.winograd_conv2d(
                x, w, transformed=co.ops.winograd_conv2d_pack(w, 1, 4)
            ),
            "'tile' must be 2, 4 or 6 beside transformed, got 'auto'",
        ),
        (lambda x, w: co.ops.winograd_conv2d(x, w[..., :2, :2]), "'weight' must be .* wide"),
        (lambda x, w: co.ops.winograd_conv2d(x[:, :, :2], w), "'x' must be at least 3 × 3 large"),
        (lambda x, w: co.ops.winograd_conv1d(x, w), "winograd_conv1d: argument 'x'"),
        (lambda x, w: co.ops.winograd_conv1d(x[0], w), "winograd_conv1d: argument 'weight'"),
        (
            lambda x, w: co.ops.winograd_conv1d(x[0], w[0], padding=(1, 1)),
            "winograd_conv1d: argument 'padding' .* got \\(1, 1\\)",
        ),
        (lambda x, w: co.ops.winograd_conv2d_pack(w[0]), "winograd_conv2d_pack: argument 'weight'"),
        (lambda x, w: co.ops.winograd_conv2d_pack(w, 4), "argument 'groups' must be .* got 4"),
        (lambda x, w: co.ops.winograd_conv2d_pack(w, 1, 3), "argument 'tile' must be .* got 3"),
        (lambda x, w: co.ops.winograd_conv2d_reference(x, w, tile=3), "argument 'tile' .* got 3"),
        (lambda x, w: co.ops.winograd_conv2d(x.double(), w), "argument 'weight' must be torch.flo"),
    ],
)
def test_bad_arguments_of_the_public_functions(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, 6, 7), torch.randn(6, 4, 3, 3))
