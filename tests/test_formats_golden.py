"""The golden file of format version 1: written byte for byte, read by two readers."""

from __future__ import annotations

import hashlib
import json
import zlib

import format_reader
import golden
import pytest
import safetensors.torch
import torch

from compressops.formats import PackedTensor
from compressops.serialize import inspect, read, verify, write

# The file never changes; nor does this.
SHA256 = "15de2e585bf49ec84f0782bfd7056a2b701a079e3c0f1fdba9a88f07123af5f8"


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_the_file_is_the_one_that_was_committed():
    assert hashlib.sha256(golden.FILE.read_bytes()).hexdigest() == SHA256


def inflated(path) -> tuple[dict, bytes, bytes]:
    """Header, data and manifest, without what depends on how the manifest was deflated: writers may
    choose among many streams, and zlib and its successors do not choose the same."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    entry = header.pop("__manifest__")
    begin, end = (size + offset for offset in entry["data_offsets"])
    assert (entry["dtype"], entry["shape"], end) == ("U8", [end - begin], len(data))
    metadata = header["__metadata__"]
    metadata.pop("compressops_digest")
    version = json.loads(metadata.pop("compressops"))
    assert version.pop("manifest") == hashlib.sha256(data[begin:]).hexdigest()[:16]
    return header | version, data[size:begin], zlib.decompress(data[begin:], -15)


def test_it_is_written_byte_for_byte(tmp_path):
    write(tmp_path / "again", golden.tensors(), golden.MODULES, golden.SHORT_CHUNKS)
    again, before = inflated(tmp_path / "again"), inflated(golden.FILE)
    assert list(again[0]) == list(before[0])
    assert again == before


def test_it_decodes_to_what_it_was_made_of():
    verify(golden.FILE)
    contents = read(golden.FILE)
    names = contents.packed | contents.tensors
    names |= {alias: names[name] for alias, name in contents.aliases.items()}
    expected = golden.tensors()
    assert set(names) == set(expected)
    for name, value in expected.items():
        if isinstance(value, PackedTensor):
            assert to_bytes(names[name].unpack()) == to_bytes(value.unpack()), name
            assert names[name].to_spec() == value.to_spec()
        else:
            assert names[name].dtype == value.dtype
            assert names[name].shape == value.shape
            assert to_bytes(names[name]) == to_bytes(value), name
    assert contents.modules == golden.MODULES
    assert contents.aliases == {"tied": "blocks", "plain.tied": "plain.running_mean"}


def test_a_reader_written_from_the_document_agrees():
    contents = read(golden.FILE)
    independent = format_reader.read(golden.FILE.read_bytes())
    for name, packed in contents.packed.items():
        assert independent.pop(name) == to_bytes(packed.unpack()), name
    for name, tensor in contents.tensors.items():
        assert independent.pop(name) == to_bytes(tensor), name
    assert set(independent) == set(contents.aliases)


def test_the_safetensors_library_opens_it():
    loaded = safetensors.torch.load_file(golden.FILE)
    contents = read(golden.FILE)
    pools = {t.name: t.pooled for t in inspect(golden.FILE).tensors if t.pooled}
    assert set(pools) == {"__F32__", "__F32_BF16__", "__BF16__", "__BOOL__"}
    pooled = {name for names in pools.values() for name in names}
    own = contents.tensors.keys() - pooled
    assert set(loaded) == {*own, *contents.packed, *pools, "__manifest__"}
    for name in own:
        assert torch.equal(loaded[name], contents.tensors[name])
    for name, packed in contents.packed.items():
        assert torch.equal(loaded[name], packed.to_blob())
    flags = torch.cat([contents.tensors[name].flatten() for name in pools["__BOOL__"]])
    assert torch.equal(loaded["__BOOL__"], flags)


def test_it_holds_every_member_of_every_axis():
    from compressops.formats import Coding, Layout, Number

    packed = [t for t in golden.tensors().values() if isinstance(t, PackedTensor)]
    for axis, field in ((Layout, "layout"), (Number, "number"), (Coding, "coding")):
        present = {type(getattr(p, field)).__name__ for p in packed}
        assert present == set(axis.members)


def test_stored_bytes_add_up():
    info = inspect(golden.FILE)
    stored = sum(tensor.stored_nbytes for tensor in info.tensors)
    assert info.header_bytes + stored == info.file_bytes == golden.FILE.stat().st_size


@pytest.mark.parametrize("seed", range(3))
def test_the_independent_reader_agrees_on_random_tensors(seed: int, tmp_path):
    from test_formats_packed import CODINGS, LAYOUTS, NUMBERS

    torch.manual_seed(seed)
    tensors = {}
    for i, number in enumerate(NUMBERS):
        weight = torch.where(torch.rand(11, 3, 5) < 0.3, torch.randn(11, 3, 5), 0.0)
        layout, coding = LAYOUTS[(i + seed) % len(LAYOUTS)], CODINGS[(i * 2 + seed) % len(CODINGS)]
        tensors[str(i)] = PackedTensor.pack(weight, layout, number, coding, lossy=True)
    write(tmp_path / "file", tensors)
    independent = format_reader.read((tmp_path / "file").read_bytes())
    for name, packed in tensors.items():
        assert independent[name] == to_bytes(packed.unpack()), packed
