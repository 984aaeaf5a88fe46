"""Packed residency: the outputs of decoded weights, one shared buffer, and little memory."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import compressops as co
from compressops.formats import PackedTensor
from compressops.formats.coding import is_coded
from compressops.formats.rows import has_rows, unpack_rows
from compressops.nn import scratch


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(4 * 64, 300),
        nn.ReLU(),
        nn.Linear(300, 5, bias=False),
    )
    return nn.Sequential(*layers).to(dtype).eval()


CONFIGS = (
    co.Huffman(),
    (co.Int(bits=8), co.Huffman()),
    (co.Sparse(), co.DynamicFixedPoint(bits=6), co.Huffman()),
    (co.LowRank(2), co.Huffman()),
)


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    gc.collect()
    assert scratch.held() == 0


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_bit_identical(config, grad: bool, last: bool) -> None:
    dense = model().to(memory_format=torch.channels_last) if last else model()
    decoded, packed = (
        co.convert(dense, config, residency=residency) for residency in ("decoded", "packed")
    )
    x = torch.randn(2, 3, 8, 8)
    results = []
    for net in (decoded, packed):
        input = x.clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            y = net(input)
        found = [y.detach()]
        if grad:
            # Layers after a layer have written over its weight by now.
            y.square().sum().backward()
            found += [input.grad, *(p.grad for p in net.parameters())]
        results.append(found)
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def normal(layer: nn.Module) -> nn.Module:
    """With weights that are worth coding: uniform ones are not."""
    nn.init.normal_(layer.weight)
    return layer


HUFFMAN = co.Huffman(chunk_size=5000)
INTEGERS = {
    "int8": (co.nn.Int8Linear, nn.Linear(300, 501), co.Int(8), HUFFMAN),
    "int8 raw": (co.nn.Int8Linear, nn.Linear(300, 501), co.Int(8), co.Raw()),
    "int4": (co.nn.Int4Linear, nn.Linear(320, 77), co.Int(4, 32, symmetric=False), HUFFMAN),
    "int3": (co.nn.Int4Linear, nn.Linear(320, 77), co.Int(3), HUFFMAN),
    "int4 raw": (co.nn.Int4Linear, nn.Linear(320, 501), co.Int(4), co.Raw()),
    "ternary": (co.nn.TernaryLinear, nn.Linear(320, 501), co.Ternary(), HUFFMAN),
    "ternary raw": (co.nn.TernaryLinear, nn.Linear(320, 501), co.Ternary(), co.Raw()),
    "rows": (co.nn.TernaryEmbedding, nn.Embedding(501, 320), co.Ternary(), HUFFMAN),
    "conv": (co.nn.Int8Conv2d, nn.Conv2d(64, 130, 3, padding=1), co.Int(8), HUFFMAN),
    "conv raw": (co.nn.Int8Conv2d, nn.Conv2d(64, 130, 3), co.Int(8), co.Raw()),
    "conv in groups": (co.nn.Int8Conv2d, nn.Conv2d(64, 68, 3, groups=4), co.Int(8), HUFFMAN),
    "depthwise": (co.nn.Int8Conv2d, nn.Conv2d(64, 64, 3, groups=64), co.Int(8), HUFFMAN),
    "blocks": (co.nn.BlockSparseLinear, nn.Linear(320, 77), None, HUFFMAN),
    "int8 blocks": (co.nn.BlockSparseInt8Linear, nn.Linear(320, 77), co.Int(8), HUFFMAN),
    "blocks of a conv": (co.nn.BlockSparseConv2d, nn.Conv2d(64, 66, 3), None, HUFFMAN),
    "no rows": (co.nn.Int8Linear, nn.Linear(300, 0), co.Int(8), co.Raw()),
    "no columns": (co.nn.Int4Linear, nn.Linear(0, 40), co.Int(4), co.Raw()),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_bit_identical(name: str) -> None:
    kind, layer, number, coding = INTEGERS[name]
    normal(layer)
    decoded, packed = (
        kind.from_float(layer, None, number, coding, residency=residency)
        for residency in ("decoded", "packed")
    )
    if coding is HUFFMAN and name != "depthwise":
        assert is_coded(packed.packed_tensors()["weight"].parts)
    if isinstance(layer, nn.Embedding):
        ids = torch.tensor([[0, 3], [500, 3]])
        assert torch.equal(packed(ids), decoded(ids))
        for wrong in (-1, 501):
            with pytest.raises(IndexError):
                packed(torch.tensor([0, wrong]))
        with pytest.raises(ValueError, match="int32 or int64"):
            packed(ids.float())
        return
    shape = (2, 64, 7, 6) if layer.weight.dim() == 4 else (3, layer.in_features)
    x, results = torch.randn(shape), []
    for net in (decoded, packed):
        with torch.no_grad():
            without = net(x)
        input = x.clone().requires_grad_()
        y = net(input)
        assert torch.equal(y, without)
        if net is packed:
            # Another layer writes over its weight.
            turned = copy.deepcopy(layer)
            turned.weight.data.neg_()
            kind.from_float(turned, None, number, coding, residency="packed")(x)
        y.square().sum().backward()
        results.append((y.detach(), input.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_of_a_table_in_another_dtype_are_rounded_once() -> None:
    table, ids = normal(nn.Embedding(50, 64)).half(), torch.arange(50)
    decoded, packed = (
        co.nn.TernaryEmbedding.from_float(table, None, co.Ternary(), residency=residency).float()
        for residency in ("decoded", "packed")
    )
    assert torch.equal(packed(ids), decoded(ids))


SHARED = [name for name in INTEGERS if not name.startswith(("rows", "no")) and "blocks" not in name]


@pytest.mark.parametrize("name", SHARED)
def test_integers_take_no_memory_of_their_own(name: str) -> None:
    kind, layer, number, coding = INTEGERS[name]
    normal(layer)
    packed = kind.from_float(layer, None, number, coding, residency="packed")
    held, seen = packed.packed_weight, []
    size = layer.in_features if layer.weight.dim() == 2 else 0

    def look(input, weight, *_):
        kept = [a for a in held.kernel() if a is not None]
        seen.append((weight.data_ptr(), torch.equal(weight, kept[0])))
        return input

    with torch.no_grad():
        packed(torch.randn(1, size) if size else torch.randn(1, 64, 5, 5))
        (buffer,) = scratch._idle.values()
        assert buffer.nbytes <= 3 * layer.weight.numel() + 64 * 16
        held.run(look, torch.zeros(1))
    assert seen == [(buffer.data_ptr(), True)]


def test_threads_on_integers() -> None:
    layers = [
        kind.from_float(normal(nn.Linear(320, 320)), None, number, HUFFMAN, residency=residency)
        for kind, number in ((co.nn.Int8Linear, co.Int(8)), (co.nn.Int4Linear, co.Int(4, 32)))
        for residency in ("decoded", "packed")
    ]
    for i in (0, 2):
        layers[i + 1] = type(layers[i]).from_module(
            layers[i], layers[i].packed_tensors()["weight"], "packed"
        )
    x, wrong = torch.randn(2, 320), []
    with torch.no_grad():
        expected = [layers[i](x) for i in (0, 2)]

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(40) if not torch.equal(layers[2 * i + 1](x), expected[i]))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_embedding_and_modes() -> None:
    table = nn.Embedding(50, 16, padding_idx=0)
    packed = co.convert(nn.Sequential(table), co.Huffman(), residency="packed")
    ids = torch.tensor([[0, 3], [49, 3]])
    with torch.inference_mode():
        assert torch.equal(packed(ids), table(ids))
    assert torch.equal(packed(ids), table(ids))
    linear = nn.Sequential(nn.Linear(16, 4))
    packed = co.convert(linear, co.Huffman(), residency="packed")
    x = torch.randn(3, 16)
    jacobian = torch.func.jacrev(packed)(x)
    assert torch.equal(jacobian, torch.func.jacrev(linear)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coding", [co.Huffman(), co.Huffman(chunk_size=100), co.Raw()], ids=str)
@pytest.mark.parametrize("rows", [[], [0], [41], [40, 41], [3, 30, 3, 0], list(range(42))], ids=len)
def test_an_embedding_decodes_the_chunks_of_its_rows(dtype, coding, rows, monkeypatch) -> None:
    table = nn.Embedding(42, 77).to(dtype)
    packed = co.nn.PackedEmbedding.from_float(table, coding=coding, residency="packed")
    decoded = []

    def symbols(stream, offsets, lengths, count, chunk_size, out=None):
        decoded.append(count)
        return co.ops.huffman_decode(stream, offsets, lengths, count, chunk_size, out)

    decoder = co.formats.coding.Decoder(symbols, co.ops.merge_planes)
    monkeypatch.setattr(co.ops, "DECODER", decoder)
    ids = torch.tensor([rows, rows], dtype=torch.int32)
    assert torch.equal(packed(ids), table(ids))
    if coding == co.Huffman(chunk_size=100):
        chunks = {at // 100 for row in rows for at in range(77 * row, 77 * (row + 1))}
        short = 100 * 33 - 42 * 77
        assert sum(decoded) == 100 * len(chunks) - (short if 32 in chunks else 0)
    for wrong in (-1, 42):
        with pytest.raises(IndexError, match=f"input must be from 0 to 41, got {wrong}"):
            packed(torch.tensor([0, wrong]))


@pytest.mark.parametrize("number", [co.Int(8), co.Int(4, 7, symmetric=False), co.Int(3)], ids=str)
@pytest.mark.parametrize("coding", [co.Huffman(chunk_size=100), co.Raw()], ids=str)
@pytest.mark.parametrize("columns", [0, 8, 77])
def test_rows_of_integers(number, coding, columns: int) -> None:
    packed = PackedTensor.pack(torch.randn(42, columns), None, number, coding, lossy=True)
    taken = columns * number.bits % 8 == 0 or "codes_lengths" in packed.parts
    assert has_rows(packed) == taken
    for rows in ([], [41], [3, 30, 4]):
        if taken:
            index = torch.tensor(rows, dtype=torch.int64)
            assert torch.equal(unpack_rows(packed, index), packed.unpack()[index])


@pytest.mark.parametrize("at_once", [None, 1, 500], ids=str)
@pytest.mark.parametrize("columns", [8, 77, 350])
def test_rows_are_decoded_some_chunks_at_a_time(at_once, columns: int, monkeypatch) -> None:
    coding, calls = co.Huffman(chunk_size=100), []
    weight = torch.randn(42, columns) * (torch.rand(42, columns) < 0.2)
    packed = PackedTensor.pack(weight, None, co.Int(8), coding, lossy=True)
    dense = packed.unpack()

    def symbols(stream, offsets, lengths, count, chunk_size, out=None):
        calls.append(count)
        return co.ops.huffman_decode(stream, offsets, lengths, count, chunk_size, out)

    if at_once is not None:
        monkeypatch.setattr("compressops.formats.rows._SYMBOLS_AT_ONCE", at_once)
    decoder = co.formats.coding.Decoder(symbols, co.ops.merge_planes)
    for rows in ([5], [41, 0, 17, 0, 41], list(range(42)), torch.randperm(42).tolist()):
        calls.clear()
        index = torch.tensor(rows)
        assert torch.equal(unpack_rows(packed, index, decoder), dense[index])
        needed = {at // 100 for row in rows for at in range(columns * row, columns * (row + 1))}
        assert len(needed) * 100 <= sum(calls) + 99 <= 100 * (len(needed) + len(calls))
        if at_once is None:
            assert len(calls) == 1
        else:
            # Of a row all, and the chunk that it shares.
            assert max(calls) <= max(at_once, columns) + 300
            assert len(calls) >= len(needed) * 100 // (max(at_once, columns) + 300)


@pytest.mark.parametrize("rows", [[], [2, 0]], ids=len)
def test_rows_of_no_columns(rows) -> None:
    packed = PackedTensor.pack(torch.randn(4, 0).bfloat16(), coding=co.Huffman())
    index = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(unpack_rows(packed, index), packed.unpack()[index])


def test_corrupt_rows_of_an_embedding_are_errors() -> None:
    table = nn.Embedding(42, 77)
    coding = co.Huffman(chunk_size=100)
    packed = co.nn.PackedEmbedding.from_float(table, coding=coding, residency="packed")
    packed.packed_weight.codes_3[10] ^= 1
    assert torch.equal(packed(torch.tensor([30])), table(torch.tensor([30])))
    with pytest.raises(ValueError, match="chunk 0: its CRC"):
        packed(torch.tensor([0, 30]))


def test_one_buffer_that_grows_and_goes() -> None:
    packed = co.convert(model(), co.Huffman(), residency="packed")
    with torch.no_grad():
        packed(torch.randn(1, 3, 8, 8))
    largest = max(layer.weight.nbytes for layer in packed if hasattr(layer, "residency"))
    assert scratch.held() == largest
    for layer in packed:
        if hasattr(layer, "residency"):
            layer.packed_weight.set_residency("decoded")
    assert scratch.held() == 0


def test_a_call_inside_a_call_has_memory_of_its_own() -> None:
    packed = co.convert(nn.Sequential(nn.Linear(9, 9)), co.Huffman(), residency="packed")[0]
    inner = co.convert(nn.Sequential(nn.Linear(9, 9)), co.Huffman(), residency="packed")[0]

    def nested(input, weight):
        before = weight.clone()
        inner(input)
        return (weight == before).all()

    with torch.no_grad():
        inner(torch.randn(2, 9))  # so that there is a buffer to be taken twice
        assert packed.packed_weight.run(nested, torch.randn(2, 9))


def test_threads() -> None:
    dense = model()
    packed = co.convert(dense, co.Huffman(), residency="packed")
    inputs = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            expected = dense(inputs[i])
            wrong.extend(i for _ in range(30) if not torch.equal(packed(inputs[i]), expected))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_copies_of_several_chunks(residency: str) -> None:
    net = nn.Sequential(nn.Linear(200, 100).to(torch.bfloat16))
    packed = co.convert(net, co.Huffman(chunk_size=4096), residency=residency)
    assert packed[0].packed_weight.packed().parts["codes_1_sizes"].numel() > 1
    for made in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(made[0].weight, packed[0].weight)
        parts = made[0].packed_weight.packed().parts
        for name, part in packed[0].packed_weight.packed().parts.items():
            assert torch.equal(parts[name], part)
            assert parts[name].data_ptr() != part.data_ptr()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("number", [co.Float("bfloat16"), co.Int(8)], ids=str)
def test_a_loaded_model_is_written_no_larger_than_its_file(number, mmap, tmp_path) -> None:
    """By pickle, by torch.save, and as a state dict: of parts of several dtypes."""
    net = nn.Sequential(nn.Linear(300, 200).to(torch.bfloat16))
    size = co.save(co.convert(net, (number, co.Huffman()), prefer="size"), tmp_path / "file")
    loaded = co.load(tmp_path / "file", net, "packed", mmap=mmap)
    data, model, state = pickle.dumps(loaded), io.BytesIO(), io.BytesIO()
    torch.save(loaded, model)
    torch.save(loaded.state_dict(), state)
    assert max(map(len, (data, model.getvalue(), state.getvalue()))) < size + 12_000
    weight = loaded[0].weight
    assert torch.equal(pickle.loads(data)[0].weight, weight)
    for file in (model, state):
        file.seek(0)
    assert torch.equal(torch.load(model, weights_only=False)[0].weight, weight)
    loaded[0].packed_weight.get_buffer(next(iter(loaded[0].packed_weight._parts))).zero_()
    loaded.load_state_dict(torch.load(state))
    assert torch.equal(loaded[0].weight, weight)


def test_loading_packed_decodes_nothing(tmp_path, monkeypatch) -> None:
    dense = model(torch.bfloat16)
    co.save(co.convert(dense, co.Huffman()), tmp_path / "file")
    decoded = []
    unpack = co.formats.PackedTensor.unpack

    def counted(self, *args, **kwargs):
        decoded.append(self.shape)
        return unpack(self, *args, **kwargs)

    monkeypatch.setattr(co.formats.PackedTensor, "unpack", counted)
    loaded = co.load(tmp_path / "file", model(torch.bfloat16), residency="packed")
    assert not [shape for shape in decoded if len(shape) > 1]
    x = torch.randn(2, 3, 8, 8).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(x), dense(x))
