"""Files made to be expensive, or damaged where it could be mistaken for something else."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
import torch
from test_serialize import rewrite, small

import compressops.formats.container as container
from compressops.formats import BlockSparse, DynamicFixedPoint, PackedTensor, Ternary
from compressops.formats.container import build_header
from compressops.serialize import (
    CorruptFileError,
    UnsupportedFormatError,
    inspect,
    read,
    verify,
    write,
)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    write(path, small(), {"conv": {"type": "PackedLinear"}})
    return path


@pytest.mark.parametrize("key", ["compressops", "compressops_digest", "__metadata__"])
def test_a_damaged_metadata_key_is_named(saved, key):
    data = saved.read_bytes()
    at = data.index(f'"{key}":'.encode()) + 3
    saved.write_bytes(data[:at] + b"?" + data[at + 1 :])
    with pytest.raises(CorruptFileError, match=f"key '{key}' is missing or damaged"):
        inspect(saved)


def test_a_file_for_newer_readers_only_names_both_versions(saved):
    rewrite(saved, lambda h, m: m.update(format_version=2, min_reader=2, more="x"))
    both = r"net\.safetensors: the file has format 2 and needs a reader of format 2; .* format 1$"
    for check in (inspect, verify, read):
        with pytest.raises(UnsupportedFormatError, match=both):
            check(saved)


BIG = [2**62 - 1] * 100_000


@pytest.mark.parametrize(
    "change",
    [
        lambda h, m: h["bn.half"].update(shape=BIG),
        lambda h, m: h["bn.half"].update(shape=[2**62] * 64),
        lambda h, m: h["bn.half"].update(shape=[10**4200]),
        lambda h, m: h["bn.half"].update(data_offsets=[10**4200, 10**4200]),
        lambda h, m: h["bn.half"].update(data_offsets=BIG),
        lambda h, m: m.update(plain=BIG),
        lambda h, m: m.update(pools=BIG),
        lambda h, m: m["pools"].update({"bn.half": {"x": BIG}}),
        lambda h, m: m["pools"].update({"bn.half": {"x": [10**4200]}}),
        lambda h, m: m["pools"].update({"bn.half": {str(i): [2**62] for i in range(50_000)}}),
        lambda h, m: m.update(formats=BIG),
        lambda h, m: m.update(modules={"a": BIG}),
        lambda h, m: m.update(defaults={"PackedLinear": dict.fromkeys(map(str, range(17)), 0)}),
    ],
)
def test_huge_values_in_a_header_are_refused_at_once(saved, change):
    rewrite(saved, change)
    begin = time.process_time()
    with pytest.raises(CorruptFileError) as caught:
        inspect(saved)
    assert time.process_time() - begin < 2
    assert len(str(caught.value)) < 2000


def test_a_header_is_not_all_of_a_large_file(tmp_path):
    path = tmp_path / "file"
    # Each is packed, and thus has an entry of its own. The names of the second deflate to half.
    repeats = {f"{i:0800}": PackedTensor.pack(torch.zeros(0)) for i in range(8_000)}
    digits = random.Random(0)
    tiny = {
        f"{digits.getrandbits(3200):0800x}": PackedTensor.pack(torch.zeros(0)) for _ in range(8_000)
    }
    with pytest.raises(ValueError, match=r"manifest of 0 bytes of data takes .*, more than \d+"):
        write(path, repeats)
    path.write_bytes((5 << 20).to_bytes(8, "little") + b" " * (5 << 20))
    with pytest.raises(CorruptFileError, match="header of 5242880 bytes in a file of 5242888"):
        read(path)
    tiny["large"] = torch.zeros(2**20)
    assert write(path, tiny) > 8 << 20
    assert len(inspect(path).tensors) == 8_001


def test_a_manifest_is_inflated_within_its_limit(saved):
    """A kilobyte of deflated spaces would be a megabyte."""
    data = saved.read_bytes()
    for extra, fits in (("", True), (" " * (1 << 15), True), (" " * (1 << 18), False)):
        saved.write_bytes(data)
        rewrite(saved, lambda header, manifest, extra=extra: manifest.update(notes=extra))
        if fits:
            with pytest.raises(CorruptFileError, match="the manifest has"):
                inspect(saved)  # a key too many: it was read
            continue
        with pytest.raises(CorruptFileError, match=r"inflates to more than \d{5,6}$"):
            inspect(saved)


def test_what_a_small_file_costs_is_small(saved):
    """[],[],… deflates a thousandfold, and an empty list takes 64 bytes."""
    rewrite(saved, lambda header, manifest: manifest.update(plain=[[]] * 1_000_000))
    assert saved.stat().st_size < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFileError, match="inflates to more than"):
            inspect(saved)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "does not end where it should"),
        (b"\xff" * 20, "manifest is not deflated"),
        (container.deflate("{}")[:-1], "does not end where it should"),
        (container.deflate("{}") + b"x", "does not end where it should"),
        (container.deflate("[]"), "manifest is no JSON object"),
        (container.deflate("{"), "manifest is no valid JSON"),
        (container.deflate('{"a":1,"a":1}'), "a key is there twice"),
        (container.deflate('{"a":NaN}'), "NaN is no JSON"),
        (container.deflate("[" * 200_000), "manifest is no valid JSON"),
    ],
)
def test_a_manifest_that_is_none(blob, message):
    with pytest.raises(CorruptFileError, match=message):
        container.inflate(blob, 1 << 20)


def test_a_manifest_of_exactly_the_limit_is_read():
    text = '{"a":"' + "b" * 4000 + '"}'
    assert container.inflate(container.deflate(text), len(text)) == {"a": "b" * 4000}
    with pytest.raises(CorruptFileError, match=f"inflates to more than {len(text) - 1}"):
        container.inflate(container.deflate(text), len(text) - 1)


def test_many_tensors_are_bounded_together(tmp_path):
    """Twelve million zeros take two bytes each time: within the limit, but only once."""
    path = tmp_path / "file"

    def hollow() -> PackedTensor:
        weight = torch.zeros(4096, 3072)
        return PackedTensor.pack(weight, BlockSparse((1024, 1024)), DynamicFixedPoint(6))

    write(path, {"a": hollow()})
    assert len(read(path).packed) == 1
    write(path, {"a": hollow(), "b": hollow()})
    together = "its 2 packed tensors take 25165824 entries' worth of work together, more than the"
    for check in (verify, read):
        with pytest.raises(CorruptFileError, match=together):
            check(path)
    assert len(read(path, {"a": 4096 * 3072}).packed) == 2
    inspect(path)


def test_the_digest_is_found_whatever_tensors_are_called(tmp_path):
    zeros = '"compressops_digest":"' + "0" * 16 + '"'
    write(tmp_path / "file", {zeros: torch.zeros(1), "0" * 16: torch.ones(1)})
    assert set(read(tmp_path / "file").tensors) == {zeros, "0" * 16}
    assert build_header([], {}) == build_header([], {})


def test_reading_a_large_weight_that_was_asked_for(tmp_path):
    path = tmp_path / "file"
    u = PackedTensor.pack(torch.ones(4000, 1), number=Ternary())
    v = PackedTensor.pack(torch.ones(1, 12_000), number=Ternary())
    write(path, {"w": PackedTensor.from_factors([u, v], (4000, 12_000), torch.float32)})
    limited = r"tensor 'w': .* takes 48000000 entries in memory, more than the"
    for check in (verify, read):
        with pytest.raises(CorruptFileError, match=limited):
            check(path, {"w": 100})
    assert read(path, {"w": 48_000_000}).packed["w"].shape == (4000, 12_000)
