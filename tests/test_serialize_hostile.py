"""Files made to be expensive, or damaged where it could be mistaken for something else."""

from __future__ import annotations

import time

import pytest
import torch
from test_serialize import rewrite, small

from compressops.formats import BlockSparse, DynamicFixedPoint, PackedTensor
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
        lambda h, m: h["bn.weight"].update(shape=BIG),
        lambda h, m: h["bn.weight"].update(shape=[2**62] * 64),
        lambda h, m: h["bn.weight"].update(shape=[10**4200]),
        lambda h, m: h["bn.weight"].update(data_offsets=[10**4200, 10**4200]),
        lambda h, m: h["bn.weight"].update(data_offsets=BIG),
        lambda h, m: m.update(plain=BIG),
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
    names = {f"{i:0100}": torch.zeros(0) for i in range(40_000)}
    with pytest.raises(ValueError, match=r"the header of 0 bytes of data takes .*, more than 419"):
        write(tmp_path / "file", names)
    (tmp_path / "file").write_bytes((5 << 20).to_bytes(8, "little") + b" " * (5 << 20))
    with pytest.raises(CorruptFileError, match="header of 5242880 bytes in a file of 5242888"):
        read(tmp_path / "file")
    names["large"] = torch.zeros(2**20)
    assert write(tmp_path / "file", names) > 8 << 20
    assert len(read(tmp_path / "file").tensors) == 40_001


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
