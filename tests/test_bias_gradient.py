"""The gradient of a float32 bias of ops whose input is float16: a sum that float16 cannot hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import compressops as co

CODES = torch.ones(16, 4, dtype=torch.int8)
SCALES = torch.ones(16)


def int8_linear(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    weight, sums = co.ops.int8_linear_pack(CODES)
    return co.ops.int8_linear(x, weight, SCALES, sums, bias)


def int4_linear(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    weight, scales, _ = co.ops.int4_linear_pack(CODES, SCALES[:, None])
    return co.ops.int4_linear(x, weight, scales, None, 16, None, bias)


def ternary_linear(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    weight, scales = co.ops.ternary_linear_pack(CODES, SCALES[:, None])
    return co.ops.ternary_linear(x, weight, scales, 16, None, bias)


def int8_conv2d(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    weight, sums = co.ops.int8_conv2d_pack(CODES[:, :, None, None])
    return co.ops.int8_conv2d(x.t()[None, :, :, None], weight, SCALES, sums, bias)


def bsr_linear(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return co.ops.bsr_linear(x, *co.ops.bsr_from_dense(CODES.float(), (16, 4)), 16, bias)


def bsr_int8_linear(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    blocks = co.ops.bsr_from_dense(CODES, (16, 4))
    values, crow, col, sums = co.ops.bsr_int8_linear_pack(*blocks, 16, 4)
    return co.ops.bsr_int8_linear(x, values, crow, col, SCALES, sums, bias)


OPS = [int8_linear, int4_linear, ternary_linear, int8_conv2d, bsr_linear, bsr_int8_linear]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_it_is_added_up_in_float32(op: Callable) -> None:
    bias = torch.zeros(16, requires_grad=True)
    y = op(torch.zeros(70001, 4, dtype=torch.float16), bias)
    assert y.dtype == torch.float16
    (found,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(found, torch.full((16,), 70001.0))
