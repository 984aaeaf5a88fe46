"""Block-sparse layers: the function of the dense layer, every option of it, dtypes, gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressops.formats import (
    BlockSparse,
    Dense,
    DynamicFixedPoint,
    Float,
    Huffman,
    Int,
    LowRank,
    PackedTensor,
    Raw,
)
from compressops.nn import BlockSparseConv2d, BlockSparseInt8Linear, BlockSparseLinear, Int8Linear

RESIDENCY = pytest.mark.parametrize("residency", ["decoded", "packed"])


def in_blocks(layer: nn.Module, block: tuple[int, int], density: float = 0.4) -> nn.Module:
    """``layer`` with most of its blocks zeroed."""
    with torch.no_grad():
        matrix = layer.weight.flatten(1)
        grid = [-(-size // side) for size, side in zip(matrix.shape, block, strict=True)]
        kept = torch.rand(grid) < density
        mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        mask = mask[: matrix.shape[0], : matrix.shape[1]].reshape(layer.weight.shape)
        layer.weight.masked_fill_(~mask, 0.0)
    return layer


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Rounding apart, as many float32 sums of other order differ."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@RESIDENCY
@pytest.mark.parametrize("number", [Float(), DynamicFixedPoint(bits=6)], ids=str)
@pytest.mark.parametrize("coding", [Raw(), Huffman()], ids=["raw", "huffman"])
@pytest.mark.parametrize("block", [(16, 16), (16, 1), (5, 7)], ids=str)
def test_linear(residency: str, number: object, coding: object, block: tuple[int, int]) -> None:
    layer = in_blocks(nn.Linear(50, 37), block)
    module = BlockSparseLinear.from_float(
        layer, BlockSparse(block), number, coding, residency=residency
    )
    x = torch.randn(3, 4, 50)
    expected = F.linear(x, module.weight, layer.bias)
    close(module(x), expected)
    with torch.no_grad():
        ours = module(x)
    again = BlockSparseLinear.from_packed(module.get_config(), module.packed_tensors(), residency)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), ours)
    assert torch.equal(copy.deepcopy(module)(x), ours)
    if coding == Raw():  # torch does not unpickle uint16, of which Huffman's tables are
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), ours)
    module.packed_weight.set_residency("packed" if residency == "decoded" else "decoded")
    assert torch.equal(module(x), ours)
    assert torch.equal(module.weight, module.packed_tensors()["weight"].unpack())


def test_only_the_stored_blocks_are_kept() -> None:
    layer = in_blocks(nn.Linear(256, 256), (16, 16), 0.25)
    module = BlockSparseLinear.from_float(layer)
    stored = module.packed_tensors()["weight"].meta["count"] * 256 * 4
    kept = sum(buffer.nbytes for buffer in module.packed_weight.resident_buffers())
    assert stored <= kept < 1.1 * stored < 0.5 * layer.weight.nbytes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "kernel_size": (4, 3), "groups": 2},
        {"padding": "valid", "groups": 6, "bias": False},
        {"padding": (2, 0), "stride": (1, 3)},
        {"padding": (1, 2), "padding_mode": "reflect", "groups": 3},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate", "kernel_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [(16, 1), (4, 6)], ids=str)
@RESIDENCY
def test_conv2d(options: dict, block: tuple[int, int], residency: str) -> None:
    layer = in_blocks(nn.Conv2d(6, 18, **{"kernel_size": 3, **options}), block)
    module = BlockSparseConv2d.from_float(layer, BlockSparse(block), residency=residency)
    x = torch.randn(3, 6, 8, 9)
    close(module(x), layer(x))
    assert module(x).is_contiguous()
    # One image, with or without its batch.
    assert torch.equal(module(x[1]), module(x[1:2])[0])
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(module(last), module(x))
    assert module(last).is_contiguous(memory_format=torch.channels_last)
    again = BlockSparseConv2d.from_packed(module.get_config(), module.packed_tensors(), residency)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))
    moved = copy.deepcopy(module).to(memory_format=torch.channels_last)
    assert torch.equal(moved(x), module(x))
    assert moved(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(0, 6, 5, 5), (2, 6, 3, 3)])
def test_conv2d_of_few_images(size: tuple[int, ...]) -> None:
    layer = in_blocks(nn.Conv2d(6, 18, 3), (16, 1))
    module, x = BlockSparseConv2d.from_float(layer), torch.randn(size)
    assert module(x).shape == layer(x).shape
    close(module(x), layer(x))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_all(density: float) -> None:
    x = torch.randn(4, 33)
    layer = in_blocks(nn.Linear(33, 20), (16, 16), density)
    close(BlockSparseLinear.from_float(layer)(x), layer(x))
    module = BlockSparseInt8Linear.from_float(layer, number=Int(bits=8))
    close(module(x), Int8Linear.from_float(layer, number=Int(bits=8))(x))


@RESIDENCY
@pytest.mark.parametrize("block", [(16, 16), (16, 1), (3, 6)], ids=str)
def test_int8_linear(residency: str, block: tuple[int, int]) -> None:
    """As `Int8Linear` on the same codes, bias and gradient too."""
    layer = in_blocks(nn.Linear(50, 37), block)
    arguments = (layer, BlockSparse(block), Int(bits=8), Huffman())
    module = BlockSparseInt8Linear.from_float(*arguments, residency=residency)
    dense = Int8Linear.from_float(*arguments)
    inputs = [torch.randn(3, 4, 50).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    grad = torch.randn(3, 4, 37)
    for each, x in zip((module, dense), inputs, strict=True):
        each.bias.grad = None
        each(x).backward(grad)
    close(module(inputs[0]), dense(inputs[0]))
    close(inputs[0].grad, inputs[1].grad)
    again = BlockSparseInt8Linear.from_packed(
        module.get_config(), module.packed_tensors(), residency
    )
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(inputs[0]), module(inputs[0]))


def test_gradients() -> None:
    layer = in_blocks(nn.Conv2d(6, 18, 3, padding=1, groups=2), (16, 1))
    module = BlockSparseConv2d.from_float(layer)
    x, grad = torch.randn(2, 6, 7, 5, requires_grad=True), torch.randn(2, 18, 7, 5)
    module(x).backward(grad)
    straight = x.detach().requires_grad_()
    F.conv2d(straight, module.weight, None, padding=1, groups=2).backward(grad)
    close(x.grad, straight.grad)
    close(module.bias.grad, grad.sum((0, 2, 3)))


def layers_and_inputs() -> list[tuple[nn.Module, torch.Tensor]]:
    return [
        (BlockSparseLinear.from_float(in_blocks(nn.Linear(20, 24), (16, 16))), torch.randn(4, 20)),
        (
            BlockSparseConv2d.from_float(in_blocks(nn.Conv2d(4, 16, 3), (16, 1))),
            torch.randn(2, 4, 6, 5),
        ),
        (
            BlockSparseInt8Linear.from_float(in_blocks(nn.Linear(20, 24), (16, 16)), number=INT8),
            torch.randn(4, 20),
        ),
    ]


INT8 = Int(bits=8)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear", "conv2d", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_autocast_compiled(which: int, dtype: torch.dtype) -> None:
    module, x = layers_and_inputs()[which]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", dtype):
        assert module(x).dtype == dtype
        assert torch.equal(module(x), module(x.to(dtype)))
    before = module(x)
    assert before.dtype == torch.float32
    parts = {k: v.clone() for k, v in module.packed_tensors()["weight"].parts.items()}
    module.to(dtype)
    assert module(x.to(dtype)).dtype == dtype
    # Blocks of floats are held in the layer's dtype, codes as they are.
    held = module.packed_weight.kernel()[0].dtype
    assert held == (torch.int8 if which == 2 else dtype)
    torch.testing.assert_close(module(x.to(dtype)).float(), before, rtol=0.05, atol=0.05)
    # A cast there and back changes nothing: the parts are what they were.
    for name, part in module.packed_tensors()["weight"].parts.items():
        assert torch.equal(part, parts[name])
    module.bias.data = module.bias.data.float()
    weight = module.float().weight
    assert torch.equal(weight, module.packed_tensors()["weight"].unpack())
    module.double()
    with pytest.raises(ValueError, match=r"float64|Double"):
        module(x.double())


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear", "conv2d", "int8"])
def test_through_the_meta_device(which: int) -> None:
    module, x = layers_and_inputs()[which]
    empty = copy.deepcopy(module).to("meta")
    assert empty(x.to("meta")).shape == module(x).shape
    empty.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty(x), module(x))


def test_refused_weights() -> None:
    with pytest.raises(ValueError, match="bsr_linear needs a weight in the layout BlockSparse"):
        BlockSparseLinear.from_float(nn.Linear(8, 8), Dense())
    with pytest.raises(ValueError, match="bsr_conv2d needs a weight in the layout BlockSparse"):
        BlockSparseConv2d.from_float(nn.Conv2d(8, 8, 3), LowRank(2))
    with pytest.raises(ValueError, match=r"bsr_int8_linear needs Int\(bits=8.*got Int\(bits=4"):
        BlockSparseInt8Linear.from_float(nn.Linear(8, 8), number=Int(bits=4))
    with pytest.raises(TypeError, match="BlockSparseConv2d replaces a Conv2d, got a Linear"):
        BlockSparseConv2d.from_float(nn.Linear(8, 8))


def test_a_shared_weight_in_two_numbers_of_groups() -> None:
    one, two = in_blocks(nn.Conv2d(3, 4, 3), (4, 1)), nn.Conv2d(6, 4, 3, groups=2)
    two.weight = one.weight
    first = BlockSparseConv2d.from_float(one)
    second = BlockSparseConv2d.from_module(two, first.packed_weight)
    assert second.packed_weight is not first.packed_weight
    for module, layer in ((first, one), (second, two)):
        x = torch.randn(2, layer.in_channels, 7, 7)
        close(module(x), layer(x))
    assert (
        BlockSparseConv2d.from_module(one, first.packed_weight).packed_weight is first.packed_weight
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_size(
    rows: int, columns: int, block: tuple[int, int], density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = in_blocks(nn.Linear(columns, rows), block, density)
    packed = PackedTensor.pack(layer.weight, BlockSparse(block))
    module, x = BlockSparseLinear.from_module(layer, packed), torch.randn(3, columns)
    close(module(x), layer(x))
