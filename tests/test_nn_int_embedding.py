"""`IntEmbedding`, packing by blocks of rows, and files that stay mapped."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compressops as co
from compressops.formats import rows as formats_rows
from compressops.formats.rows import has_rows, row_blocks, unpack_rows
from compressops.nn import Int4Linear, Int8Linear, IntEmbedding, PackedEmbedding, TernaryLinear
from compressops.reading import read

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")
RESIDENCY = pytest.mark.parametrize("residency", ["decoded", "packed"])
NUMBERS = [
    co.Int(8),
    co.Int(8, symmetric=False),
    co.Int(4, group_size=24),
    co.Int(3, group_size=16, symmetric=False),
    co.Int(5),
]
BY_NUMBER = pytest.mark.parametrize("number", NUMBERS, ids=str)
SHAPES = [(33, 72), (1, 16), (5, 8), (50, 0), (0, 8), (100, 384)]


def table(rows: int, columns: int) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(rows, columns)


@RESIDENCY
@BY_NUMBER
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_decoded_table(
    shape: tuple[int, int], number: co.Int, residency: str, dtype: torch.dtype
) -> None:
    layer = table(*shape).to(dtype)
    module = IntEmbedding.from_float(layer, None, number, residency=residency)
    dense = module.packed_tensors()["weight"].unpack()
    assert torch.equal(module.weight, dense)
    if shape[0] == 0:
        assert module(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, shape[1])
        return
    ids = torch.randint(0, shape[0], (3, 7))[:, ::2]
    for indices in (ids, ids.int(), ids[0, 0], ids[:0]):
        found = module(indices)
        assert found.dtype == dtype
        assert torch.equal(found, dense[indices.long()])
    assert not list(module.packed_weight.resident_buffers())


@BY_NUMBER
def test_copies_and_states(number: co.Int) -> None:
    layer, ids = table(40, 64), torch.arange(40)
    module = IntEmbedding.from_float(layer, None, number)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(ids), module(ids))
    other = IntEmbedding.from_float(nn.Embedding(40, 64), None, co.Int(2))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(ids), module(ids))
    assert torch.equal(module.half()(ids), module.weight)
    assert module(ids).dtype == torch.float16


def test_it_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    module, ids = IntEmbedding.from_float(table(40, 64), None, co.Int(4)), torch.arange(9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), module(ids))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of whole bytes, got 9 codes of 4 bits"):
        IntEmbedding.from_float(table(5, 9), None, co.Int(4))
    with pytest.raises(ValueError, match="codes of one length, got Huffman"):
        IntEmbedding.from_float(table(5, 8), None, co.Int(4), co.Huffman())
    with pytest.raises(ValueError, match="Int or Ternary, got Float"):
        IntEmbedding.from_float(table(5, 8))
    module = IntEmbedding.from_float(table(5, 8), None, co.Int(4))
    for bad in (5, -1):
        with pytest.raises(IndexError):
            module(torch.tensor([0, bad]))
    with pytest.raises(ValueError, match=r"input must be int32 or int64, got torch.float32"):
        module(torch.zeros(2))


def test_convert_takes_it_for_size(tmp_path: Path) -> None:
    model = nn.Sequential(table(40, 64), nn.Linear(64, 3)).eval()
    ids = torch.arange(40)
    config = {"0": co.Int(8), "1": None}
    fast = co.convert(model, config)
    assert type(fast[0]) is PackedEmbedding
    small = co.convert(model, config, prefer="size")
    assert type(small[0]) is IntEmbedding
    assert torch.equal(small(ids), fast(ids))
    coded = co.convert(model, {"0": (co.Int(4), co.Huffman()), "1": None}, prefer="size")
    assert type(coded[0]) is PackedEmbedding
    assert "look-ups need codes of one length, got Huffman" in coded.conversion_notes["0"].why
    co.save(small, tmp_path / "net.safetensors")
    loaded = co.load(tmp_path / "net.safetensors", model)
    assert type(loaded[0]) is IntEmbedding
    assert torch.equal(loaded(ids), small(ids))


# Rows of other packed weights.


@pytest.mark.parametrize("number", [*NUMBERS, co.Ternary(), co.Ternary("row")], ids=str)
@pytest.mark.parametrize("coding", [co.Raw(), co.Huffman(chunk_size=100)], ids=str)
def test_unpack_rows(number: co.formats.Number, coding: co.formats.Coding) -> None:
    packed = co.PackedTensor.pack(table(33, 72).weight, None, number, coding, lossy=True)
    wanted = torch.tensor([3, 32, 0])
    assert has_rows(packed)
    assert torch.equal(unpack_rows(packed, wanted), packed.unpack()[wanted])


CASES = [
    (Int8Linear, co.Int(8)),
    (Int4Linear, co.Int(4)),
    (Int4Linear, co.Int(4, group_size=32, symmetric=False)),
    (Int4Linear, co.Int(3)),
    (TernaryLinear, co.Ternary()),
    (TernaryLinear, co.Ternary("row")),
    (TernaryLinear, co.Ternary("group", group_size=16)),
]


@pytest.mark.parametrize("coding", [co.Raw(), co.Huffman()], ids=str)
@pytest.mark.parametrize("rows", [1, 31, 64, 65, 209])
@pytest.mark.parametrize(("kind", "number"), CASES, ids=str)
def test_blocks_of_rows_are_packed_as_the_whole(
    kind: type, number: co.formats.Number, rows: int, coding: co.formats.Coding, monkeypatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(67, rows)
    whole = kind.from_float(layer, None, number, coding)
    monkeypatch.setattr(formats_rows, "_AT_ONCE", 67 * 70)
    packed = whole.packed_weight.packed()
    blocks = list(row_blocks(packed, kind.weight_type.rows_together, co.ops.DECODER))
    # Codes of whole bytes need no memory of their own.
    is_whole = packed.number.bits == 8 or isinstance(coding, co.Huffman)
    assert len(blocks) > 1 or rows <= 65 or is_whole
    codes = packed.dense_codes()
    assert torch.equal(torch.cat([some for _, some in blocks]), codes)
    assert all(torch.equal(codes[place], some) for place, some in blocks)
    parts = kind.from_float(layer, None, number, coding)
    for mine, other in zip(parts.packed_weight.kernel(), whole.packed_weight.kernel(), strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)
    x = torch.randn(3, 67)
    assert torch.equal(parts(x), whole(x))


# Mapped files.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Embedding(400, 96), nn.Linear(96, 33), nn.LayerNorm(33), nn.Linear(33, 5)
    return nn.Sequential(*layers).eval()


CONFIG = {"0": co.Int(8), "1": co.Ternary("row"), "*": None}


def addresses(path: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [(int(begin, 16), int(end, 16)) for begin, end in found]


def within(tensor: Tensor, spans: list[tuple[int, int]]) -> bool:
    return any(begin <= tensor.data_ptr() < end for begin, end in spans)


@RESIDENCY
@pytest.mark.parametrize("config", [CONFIG, {"0": co.Float("bfloat16"), "*": None}], ids=str)
def test_a_mapped_file_gives_the_same_model(config: dict, residency: str, tmp_path: Path) -> None:
    path, ids = tmp_path / "net.safetensors", torch.arange(0, 400, 7)
    packed = co.convert(network(), config, prefer="size")
    co.save(packed, path)
    with torch.device("meta"):
        skeleton = network()
    before = path.read_bytes()
    loaded = co.load(path, skeleton, residency, inplace=True, mmap=True).eval()
    plain = co.load(path, network(), residency)
    assert torch.equal(loaded(ids), plain(ids))
    spans = addresses(path)
    assert within(loaded[0].packed_weight.packed().parts["codes"], spans)
    assert not within(plain[0].packed_weight.packed().parts["codes"], spans)
    # What is written to tensors is not in the file; nor does a new file change the model.
    expected = loaded(ids)
    with torch.no_grad():
        loaded[2].weight.mul_(2)
    assert path.read_bytes() == before
    changed = loaded(ids)
    assert not torch.equal(changed, expected)
    other = network()
    with torch.no_grad():
        other[0].weight.neg_()
    co.save(co.convert(other, config, prefer="size"), path)
    assert torch.equal(loaded(ids), changed)
    path.unlink()
    assert torch.equal(loaded(ids), changed)
    co.save(loaded, path)
    assert torch.equal(co.load(path, network())(ids), changed)
    before = path.read_bytes()
    again = co.load(path, network(), residency, mmap=True)
    again[0].packed_weight.packed().parts["codes"].view(torch.uint8).bitwise_not_()
    assert path.read_bytes() == before


def test_a_damaged_file_is_found_where_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    co.save(co.convert(network(), CONFIG, prefer="size"), path)
    data = bytearray(path.read_bytes())
    for place in (9, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(co.serialize.CorruptFileError):
            co.load(path, network(), mmap=True)
    path.write_bytes(data[:-1])
    with pytest.raises(co.serialize.CorruptFileError):
        co.load(path, network(), mmap=True)
    path.write_bytes(b"")
    with pytest.raises(co.serialize.CorruptFileError):
        co.load(path, network(), mmap=True)


def test_what_is_read_of_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    co.save(co.convert(network(), CONFIG, prefer="size"), path)
    plain, mapped = read(path), read(path, mmap=True)
    assert plain.mapping is None
    plain.release()
    mapped.settle()
    assert plain.tensors.keys() == mapped.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert torch.equal(tensor, mapped.tensors[name])
    for name, packed in plain.packed.items():
        assert torch.equal(packed.unpack(), mapped.packed[name].unpack())


def test_mapped_files_whatever_their_offsets(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    for width in range(64, 72):  # Huffman streams end anywhere, and the next part begins there
        torch.manual_seed(width)
        layers = [nn.Linear(64, width), nn.Linear(width, 300), nn.Linear(300, 200)]
        co.save(co.convert(nn.Sequential(*layers), (co.Int(8), co.Huffman())), path)
        fresh = [nn.Linear(64, width), nn.Linear(width, 300), nn.Linear(300, 200)]
        for residency in ("decoded", "packed"):
            mapped = co.load(path, nn.Sequential(*fresh), residency, mmap=True)
            plain = co.load(path, nn.Sequential(*fresh), residency)
            x = torch.randn(2, 64)
            assert torch.equal(mapped(x), plain(x))


@pytest.mark.parametrize(
    ("number", "copied"), [(co.Int(8), True), (co.Int(4, group_size=16), False)], ids=str
)
def test_a_scale_a_row_is_not_left_in_a_mapped_file(
    number: co.Int, copied: bool, tmp_path: Path
) -> None:
    model = co.convert(nn.Sequential(table(40, 64)), {"*": number}, prefer="size")
    size = co.save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(table(40, 64))
    held = co.load(tmp_path / "model.safetensors", fresh, mmap=True)[0].packed_weight
    codes, scales = (held.get_buffer(name) for name in ("codes", "scales"))
    assert (0 < scales.data_ptr() - codes.data_ptr() < size) != copied
    assert scales.untyped_storage().nbytes() == scales.nbytes
