"""`TernaryLinear` and `TernaryEmbedding`: 2 bits in memory, one weight for both."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressops.formats import BlockSparse, Dense, Huffman, Int, Raw, Sparse, Ternary
from compressops.nn import TernaryEmbedding, TernaryLinear
from compressops.ops import packed_linear
from compressops.ops.int8_linear import quantize_rows
from compressops.ops.ternary_linear import CODES

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")
RESIDENCY = pytest.mark.parametrize("residency", ["decoded", "packed"])
NUMBERS = [Ternary(), Ternary("row"), Ternary("group", group_size=32), Ternary("group", 500)]
# Rows: panels of 32 and one of 16, padded or not; columns: words of 16 codes, whole or not.
SHAPES = [(33, 70), (64, 64), (48, 100), (1, 16), (100, 384), (50, 0), (0, 8)]
BY_NUMBER = pytest.mark.parametrize("number", NUMBERS, ids=str)
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def layer_of(kind: type[nn.Module], rows: int, columns: int, **options: object) -> nn.Module:
    sizes = (columns, rows) if kind is nn.Linear else (rows, columns)
    layer = kind(*sizes, **options, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@RESIDENCY
@BY_NUMBER
@BY_SHAPE
def test_linear_runs_the_op(shape: tuple[int, int], number: Ternary, residency: str) -> None:
    layer = layer_of(nn.Linear, *shape)
    module = TernaryLinear.from_float(layer, None, number, residency=residency)
    x = torch.randn(2, 3, shape[1])
    q, scales = quantize_rows(x)
    exact = F.linear(q.double() * scales.double(), module.weight.double(), layer.bias.double())
    assert (module(x) - exact).norm() <= 1e-5 * exact.norm()
    assert torch.equal(module.weight, module.packed_tensors()["weight"].unpack())
    assert module.op == "ternary_linear"


@RESIDENCY
@BY_NUMBER
@BY_SHAPE
def test_embedding_gives_the_decoded_rows(
    shape: tuple[int, int], number: Ternary, residency: str
) -> None:
    layer = layer_of(nn.Embedding, *shape)
    module = TernaryEmbedding.from_float(layer, None, number, residency=residency)
    if shape[0] == 0:
        return assert_empty(module, shape)
    index = torch.arange(3 * shape[0]).view(3, -1) * 7 % shape[0]
    for rows in (index, index.int(), index.t(), index[:, :0], index[0, 0]):
        assert torch.equal(module(rows), module.weight[rows])
    for bad in (shape[0], -1, 2**40):
        with pytest.raises(IndexError):
            module(torch.tensor([0, bad]))


def assert_empty(module: TernaryEmbedding, shape: tuple[int, int]) -> None:
    assert module(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, shape[1])
    with pytest.raises(IndexError):
        module(torch.tensor(0))


@pytest.mark.parametrize("columns", [70, 128, 1])
def test_rows_of_either_form(columns: int) -> None:
    """In a GPU's fragments, and in a CPU's panels."""
    codes = torch.randint(-1, 2, (45, columns), dtype=torch.int8)
    unsigned = (codes + 1).to(torch.uint8)
    rows = torch.tensor([[0, 44, 7], [13, 13, 35]])
    scales = torch.rand(45, -(-columns // 32))
    expected = codes[rows] * scales.repeat_interleave(32, 1)[:, :columns][rows]
    for packed, values in (
        (CODES.pack_fragments(unsigned), scales.t().contiguous()),
        (CODES.pack(codes), packed_linear.to_panels(scales)),
    ):
        assert torch.equal(CODES.unpack_rows(packed, rows, 45, columns), unsigned[rows])
        found = packed_linear.dequantize_rows(CODES, packed, values, rows, 45, columns, 32)
        assert torch.equal(found, expected)


def test_only_two_bits_are_in_memory() -> None:
    layer = layer_of(nn.Embedding, 1000, 384)
    held = TernaryEmbedding.from_float(layer, None, Ternary()).packed_weight
    assert sum(t.nbytes for t in held.resident_buffers()) < 1.1 * (1008 * 384 / 4 + 1008 * 4)
    assert not any(t.is_floating_point() and t.numel() > 1008 for t in held.buffers())


@RESIDENCY
def test_an_embedding_and_an_output_layer_share_a_weight(residency: str) -> None:
    table = layer_of(nn.Embedding, 50, 64)
    embedding = TernaryEmbedding.from_float(table, None, Ternary("row"), residency=residency)
    head = TernaryLinear.from_module(
        layer_of(nn.Linear, 50, 64, bias=False), embedding.packed_weight
    )
    model = nn.Sequential(embedding, head)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].packed_weight is copied[1].packed_weight
        expected = F.linear(embedding.weight, embedding.weight)
        assert (copied(torch.arange(50)) - expected).norm() < 0.01 * expected.norm()


@RESIDENCY
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
@pytest.mark.parametrize(
    ("layout", "coding"), [(Dense(), Huffman()), (Sparse(), Raw()), (BlockSparse((4, 4)), Raw())]
)
def test_layouts_state_and_config(
    kind: type[nn.Module], layout: object, coding: object, residency: str
) -> None:
    target = TernaryLinear if kind is nn.Linear else TernaryEmbedding
    layer = layer_of(kind, 24, 64)
    module = target.from_float(layer, layout, Ternary("row"), coding, residency=residency)
    x = torch.randn(5, 64) if kind is nn.Linear else torch.arange(24)
    expected = target.from_float(layer, None, Ternary("row"))(x)
    assert torch.equal(module(x), expected)
    config = json.loads(json.dumps(module.get_config()))
    again = target.from_packed(config, module.packed_tensors(), residency)
    again.load_state_dict(module.state_dict())
    for other in (again, copy.deepcopy(module)):
        assert torch.equal(other(x), expected)
    # A state with other granularity has scales of other shapes.
    other = target.from_float(layer, None, Ternary("group", 16), residency=residency)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(x), other(x))


def test_meta_and_back() -> None:
    for target, kind in ((TernaryLinear, nn.Linear), (TernaryEmbedding, nn.Embedding)):
        module = target.from_float(layer_of(kind, 40, 80), None, Ternary("group", 16))
        x = torch.randn(3, 80) if kind is nn.Linear else torch.tensor([1, 39])
        empty = copy.deepcopy(module).to("meta")
        assert empty(x.to("meta")).shape == module(x).shape
        empty.to_empty(device="cpu").load_state_dict(module.state_dict())
        assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_and_autocast(dtype: torch.dtype) -> None:
    layer = layer_of(nn.Linear, 24, 64)
    module, x = TernaryLinear.from_float(layer, None, Ternary("row")), torch.randn(6, 64)
    with torch.autocast("cpu", dtype):
        assert module(x).dtype == layer(x).dtype == dtype
    expected = module(x)
    module.to(dtype)
    assert module(x.to(dtype)).dtype == dtype
    assert (module(x.to(dtype)).float() - expected).norm() < 0.02 * expected.norm()
    table = TernaryEmbedding.from_float(layer_of(nn.Embedding, 9, 32), None, Ternary()).to(dtype)
    assert table(torch.arange(9)).dtype == dtype
    assert torch.equal(table(torch.arange(9)), table.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_and_compile(bias: bool) -> None:
    layer = layer_of(nn.Linear, 10, 64, bias=bias)
    module = TernaryLinear.from_float(layer, None, Ternary("group", 32))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, grad = torch.randn(6, 64, requires_grad=True), torch.randn(6, 10)
    for run in (module, compiled):
        module.zero_grad()
        x.grad = None
        run(x).backward(grad)
        torch.testing.assert_close(x.grad, grad @ module.weight)
        if bias:
            torch.testing.assert_close(module.bias.grad, grad.sum(0))
    assert torch.equal(compiled(x), module(x))


def test_look_ups_compile() -> None:
    table = TernaryEmbedding.from_float(layer_of(nn.Embedding, 40, 64), None, Ternary("row"))
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    for index in (torch.tensor([[3, 39], [0, 0]]), torch.tensor([7])):
        assert torch.equal(compiled(index), table(index))
    with pytest.raises(IndexError):
        compiled(torch.tensor([40]))


def test_what_does_not_fit_is_named() -> None:
    layer = layer_of(nn.Linear, 10, 64)
    with pytest.raises(ValueError, match=r"ternary_linear needs Ternary, got Int\(bits=4\)"):
        TernaryLinear.from_float(layer, None, Int(bits=4))
    with pytest.raises(ValueError, match=r"multiple of 16, got Ternary.*group_size=24"):
        TernaryLinear.from_float(layer, None, Ternary("group", 24))
    table = nn.Embedding(4, 16, max_norm=1.0)
    with pytest.raises(ValueError, match=r"max_norm=1.0"):
        TernaryEmbedding.from_float(table, None, Ternary())
    module = TernaryEmbedding.from_float(nn.Embedding(4, 16), None, Ternary())
    with pytest.raises(ValueError, match="'rows' must be int32 or int64, got"):
        module(torch.tensor([0.0]))
