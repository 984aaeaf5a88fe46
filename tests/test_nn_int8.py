"""`Int8Linear`: the op on packed weights, its gradient, its dtypes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from compressops import ops
from compressops.formats import Dense, Huffman, Int, Raw
from compressops.nn import Int8Linear

RESIDENCY = pytest.mark.parametrize("residency", ["decoded", "packed"])
INT8 = Int(bits=8)


@RESIDENCY
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("coding", [Raw(), Huffman()], ids=["raw", "huffman"])
def test_int8_linear_runs_the_op(residency: str, bias: bool, coding: object) -> None:
    layer = nn.Linear(70, 33, bias=bias)
    module = Int8Linear.from_float(layer, Dense(), INT8, coding, residency=residency)
    x = torch.randn(4, 5, 70)
    packed = module.packed_tensors()["weight"]
    codes = packed.dense_codes().view(33, 70)
    scales = packed.params["scales"].view(33)
    expected = ops.int8_linear(x, codes, scales, codes.sum(1, dtype=torch.int32), layer.bias)
    assert torch.equal(module(x), expected)
    assert (module(x) - layer(x)).norm() < 0.02 * layer(x).norm()
    again = Int8Linear.from_packed(module.get_config(), module.packed_tensors(), residency)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    assert torch.equal(module.weight, packed.unpack())


def test_int8_linear_gradient() -> None:
    module = Int8Linear.from_float(nn.Linear(24, 10), Dense(), INT8)
    x = torch.randn(6, 24, requires_grad=True)
    grad = torch.randn(6, 10)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ module.weight)


def test_int8_linear_in_half_precision_and_compiled() -> None:
    module = Int8Linear.from_float(nn.Linear(24, 10), Dense(), INT8)
    x = torch.randn(6, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    parts = {k: v.clone() for k, v in module.packed_tensors()["weight"].parts.items()}
    module.bfloat16()
    assert module(x.bfloat16()).dtype == torch.bfloat16
    for name, part in module.packed_tensors()["weight"].parts.items():
        assert torch.equal(part, parts[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_linear_follows_autocast(dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 10)
    module = Int8Linear.from_float(layer, Dense(), INT8)
    x = torch.randn(6, 24)
    with torch.autocast("cpu", dtype):
        assert module(x).dtype == layer(x).dtype == dtype
        assert torch.equal(module(x), module(x.to(dtype)))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), module(x))
        with torch.autocast("cpu", enabled=False):
            assert module(x).dtype == torch.float32
    assert module(x).dtype == torch.float32


def test_int8_linear_refuses_other_numbers() -> None:
    with pytest.raises(ValueError, match="Int\\(bits=4"):
        Int8Linear.from_float(nn.Linear(24, 10), Dense(), Int(bits=4))
