"""The file: every broken byte is found, saving is atomic, loading is strict."""

from __future__ import annotations

import errno
import json
import os
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compressops.formats.container as container
import compressops.formats.manifest as manifest
from compressops.formats import (
    DynamicFixedPoint,
    Huffman,
    PackedTensor,
    Sparse,
)
from compressops.formats.container import deflate, digest
from compressops.serialize import (
    CorruptFileError,
    UnsupportedFormatError,
    inspect,
    read,
    verify,
    write,
)


def small() -> dict[str, torch.Tensor | PackedTensor]:
    weight = torch.where(torch.rand(6, 8) < 0.3, torch.randn(6, 8), 0.0)
    return {
        "conv.weight": PackedTensor.pack(
            weight, Sparse(), DynamicFixedPoint(6), Huffman(), lossy=True
        ),
        "bn.weight": torch.randn(2),
        "bn.bias": torch.randn(3),
        "bn.steps": torch.tensor(3),
        "bn.half": torch.randn(1).to(torch.bfloat16),
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    write(path, small(), {"conv": {"type": "PackedLinear"}})
    return path


def test_round_trip(tmp_path):
    tensors = small()
    path = tmp_path / "net.safetensors"
    assert write(str(path), tensors, {"conv": {"type": "A", "bias": False}}) == path.stat().st_size
    contents = read(path)
    assert contents.modules == {"conv": {"type": "A", "bias": False}}
    assert list(contents.packed) == ["conv.weight"]
    for name, tensor in contents.tensors.items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype
    packed = contents.packed["conv.weight"]
    assert torch.equal(packed.unpack(), tensors["conv.weight"].unpack())
    assert "5 tensors, 1 of them packed" in str(verify(path))


def test_any_kind_of_tensor(tmp_path):
    tensors = {
        str(dtype): torch.zeros(2, 0) if i % 3 == 2 else torch.ones((3,) * (i % 3)).to(dtype)
        for i, dtype in enumerate(container.DTYPE_NAMES)
    }
    tensors["transposed"] = torch.randn(3, 4).t()
    tensors["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    tensors["expanded"] = torch.randn(3, 1).expand(3, 4)
    tensors['na"me\\ ü\n'] = torch.randn(2, requires_grad=True)
    write(tmp_path / "file", tensors)
    read_back = read(tmp_path / "file").tensors
    for name, tensor in tensors.items():
        assert read_back[name].dtype == tensor.dtype
        same = read_back[name].view(torch.uint8) if "float8" in name else read_back[name]
        assert torch.equal(same, tensor.view(torch.uint8) if "float8" in name else tensor), name


def test_an_empty_file_and_tied_tensors(tmp_path):
    write(tmp_path / "empty", {})
    assert read(tmp_path / "empty").tensors == {}
    shared = torch.randn(50)
    tensors = small() | {"a": shared, "b": shared, "half": shared[:25]}
    tensors["conv2.weight"] = tensors["conv.weight"]
    write(tmp_path / "tied", tensors)
    contents = read(tmp_path / "tied")
    assert contents.aliases == {"b": "a", "conv2.weight": "conv.weight"}
    assert torch.equal(contents.tensors["half"], shared[:25])


def test_views_that_conjugate_or_negate_are_tensors_of_their_own(tmp_path):
    z = torch.randn(5, dtype=torch.complex64)
    tensors = {"a": z, "b": z.conj(), "c": z.imag, "d": z.conj().imag, "e": z.conj()}
    assert tensors["d"].is_neg()
    assert tensors["d"].data_ptr() == tensors["c"].data_ptr()
    write(tmp_path / "file", tensors)
    contents = read(tmp_path / "file")
    assert contents.aliases == {"e": "b"}
    for name, tensor in contents.tensors.items():
        assert torch.equal(tensor, tensors[name].resolve_conj().resolve_neg()), name


def test_every_flipped_byte_is_found(saved):
    data = saved.read_bytes()
    for position in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[position] ^= mask
            saved.write_bytes(changed)
            # Never UnsupportedFormatError: to its user a damaged file is one of ours.
            with pytest.raises(CorruptFileError):
                verify(saved)
    saved.write_bytes(data)
    verify(saved)


def test_every_truncation_and_extension_is_found(saved):
    data = saved.read_bytes()
    for size in range(len(data)):
        saved.write_bytes(data[:size])
        for check in (verify, inspect, read):
            with pytest.raises(CorruptFileError):
                check(saved)
    for extra in (b"\0", b"x" * 100, data):
        saved.write_bytes(data + extra)
        with pytest.raises(CorruptFileError, match="bytes, the header describes"):
            inspect(saved)


@settings(max_examples=300)
@given(data=st.data())
def test_random_damage(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "file"
    torch.manual_seed(0)
    write(path, small())
    original = path.read_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(changed)))
        end = data.draw(st.integers(begin, min(len(changed), begin + 40)))
        changed[begin:end] = data.draw(st.binary(max_size=40))
    path.write_bytes(changed)
    if changed != original:
        with pytest.raises((CorruptFileError, UnsupportedFormatError)):
            verify(path)


def test_verify_lists_every_wrong_tensor(saved):
    data = bytearray(saved.read_bytes())
    position = 8 + int.from_bytes(data[:8], "little")
    for tensor in inspect(saved).tensors:
        if tensor.name != "bn.half":
            data[position] ^= 1
        position += tensor.stored_nbytes
    saved.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"net\.safetensors: tensor 'bn\.steps'") as caught:
        verify(saved)
    # Of a pool nobody can say which of its members it is.
    assert caught.value.tensors == ("bn.steps", "bn.bias", "bn.weight", "conv.weight")


def rewrite(path, change) -> None:
    """Change header and manifest as JSON, and give them right digests again. ``change`` is given
    the header, and the manifest with the keys of the metadata."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    begin, end = header["__manifest__"]["data_offsets"]
    body, blob = data[8 + size : 8 + size + begin], data[8 + size + begin :]
    version = json.loads(metadata["compressops"])
    manifest = version | json.loads(zlib.decompress(blob, -15))
    change(header, manifest)
    inside = {key: value for key, value in manifest.items() if key not in version}
    blob = deflate(json.dumps(inside))
    manifest["manifest"] = manifest.pop("blob_hash", digest(blob))
    if metadata is header.get("__metadata__"):
        stated = {key: manifest[key] for key in version if key in manifest}
        metadata["compressops"] = json.dumps(stated)
        metadata["compressops_digest"] = "0" * 16
    if (entry := header.get("__manifest__")) and entry["data_offsets"] == [begin, end]:
        entry |= {"shape": [len(blob)], "data_offsets": [begin, begin + len(blob)]}
    text = json.dumps(header).encode()
    text = text.replace(b'_digest": "' + b"0" * 16, b'_digest": "' + digest(text).encode())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body + blob)


def set_packed(**values):
    return lambda header, manifest: manifest["packed"]["conv.weight"].update(values)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda h, m: m.update(format_version=3, min_reader=2),
            UnsupportedFormatError,
            "has format 3 and needs a reader of format 2; this one reads up to format 1",
        ),
        (lambda h, m: m.update(format_version=0), CorruptFileError, "format_version is 0"),
        (lambda h, m: m.pop("min_reader"), CorruptFileError, "min_reader is None"),
        (lambda h, m: m.update(more=1), CorruptFileError, "the manifest has"),
        (lambda h, m: m.pop("plain"), CorruptFileError, "the manifest has"),
        (lambda h, m: m.update(blob_hash="0"), CorruptFileError, "its manifest has hash"),
        (
            lambda h, m: h["__manifest__"].update(dtype="I8"),
            CorruptFileError,
            "the last tensor is '__manifest__', no",
        ),
        (lambda h, m: h.pop("__manifest__"), CorruptFileError, "header describes"),
        (lambda h, m: m.update(pools=[]), CorruptFileError, r"pools is \[\]"),
        (lambda h, m: m["pools"].update(x={}), CorruptFileError, "pool 'x' holds"),
        (lambda h, m: m["pools"].update({"bn.half": 1}), CorruptFileError, "'bn.half' holds 1"),
        (
            lambda h, m: m["pools"]["__F32__"].update({"bn.bias": [2]}),
            CorruptFileError,
            r"pool '__F32__' of shape \[5\] holds 4 entries",
        ),
        (
            lambda h, m: m["pools"]["__F32__"].update({"bn.bias": [-3]}),
            CorruptFileError,
            r"'bn.bias' has shape \[-3\]",
        ),
        (
            lambda h, m: m["pools"]["__F32__"].update({"bn.half": []} | {"bn.bias": [2]}),
            CorruptFileError,
            "tensor 'bn.half' is there twice",
        ),
        (
            lambda h, m: m["pools"]["__F32__"].update(w=[0, 2**40, 2**40]),
            CorruptFileError,
            "'w' has shape .* too large",
        ),
        (lambda h, m: m.update(aliases={"a": "__F32__"}), CorruptFileError, "'a' of '__F32__'"),
        (lambda h, m: m["plain"].pop(), CorruptFileError, "plain must be 3 hashes"),
        (lambda h, m: m.update(packed=[]), CorruptFileError, r"packed is \[\]"),
        (lambda h, m: m.update(formats={}), CorruptFileError, "formats must be a list"),
        (lambda h, m: m.update(aliases={"a": "b"}), CorruptFileError, "alias 'a' of 'b'"),
        (lambda h, m: m.update(modules={"a": 1}), CorruptFileError, "module 'a' has the config 1"),
        (
            lambda h, m: m["formats"][0]["number"].update(type="Posit"),
            UnsupportedFormatError,
            "tensor 'conv.weight': unknown number 'Posit'",
        ),
        (set_packed(format=1), CorruptFileError, "'conv.weight' has format 1"),
        (set_packed(encoded="0"), CorruptFileError, "stored bytes have hash"),
        (set_packed(decoded="0"), CorruptFileError, "decoded bytes have hash"),
        (set_packed(shape=[8, 7]), CorruptFileError, "tensor 'conv.weight'"),
        (
            lambda h, m: h["bn.half"].update(dtype="F4"),
            UnsupportedFormatError,
            "unknown dtype 'F4'",
        ),
        (lambda h, m: h["bn.half"].update(shape=[3]), CorruptFileError, r"BF16 \[3\] takes 6"),
        (lambda h, m: h["bn.half"].update(shape=[-2, -1]), CorruptFileError, "has shape"),
        (
            lambda h, m: h["bn.half"].update(shape=[0, 2**40, 2**40], data_offsets=[28, 28]),
            CorruptFileError,
            "'bn.half' has shape .* too large",
        ),
        (
            lambda h, m: h["bn.half"].update(data_offsets=[0, 2]),
            CorruptFileError,
            "begins at 0, the one before ends at 28",
        ),
        (lambda h, m: h.pop("bn.half"), CorruptFileError, "begins at 30"),
        (lambda h, m: h.pop("__metadata__"), UnsupportedFormatError, "no file of compressops"),
        (
            lambda h, m: h.update(__metadata__={"format": "pt"}),
            UnsupportedFormatError,
            "no file of compressops",
        ),
    ],
)
def test_headers_with_a_right_digest_are_checked_too(saved, change, error, message):
    rewrite(saved, change)
    with pytest.raises(error, match=message):
        read(saved)


def test_a_newer_format_that_we_may_read_can_have_more_keys(saved):
    rewrite(saved, lambda h, m: m.update(format_version=2, notes="new"))
    assert read(saved).format_version == 2
    metadata = {"format_version": 2, "min_reader": 1, "manifest": "", "signature": "new"}
    assert manifest._check_version(metadata)
    with pytest.raises(CorruptFileError, match="the metadata has"):
        manifest._check_version(metadata | {"format_version": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too few for a header"),
        (b"\xff" * 8, "header of 18446744073709551615 bytes in a file of 8"),
        (b"\2" + bytes(7) + b"[]", "no JSON object"),
        (b"\1" + bytes(7) + b"[", "no valid JSON"),
        (b"\3" + bytes(7) + b"NaN", "NaN is no JSON"),
        (b"\x0d" + bytes(7) + b'{"a":1,"a":2}', "a key is there twice"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "no valid JSON"),
        ((6000).to_bytes(8, "little") + b"9" * 6000, "no valid JSON"),
        (b"\2" + bytes(7) + b"\xff\xff", "no valid JSON"),
    ],
)
def test_what_is_no_file_of_ours(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    for check in (verify, inspect, read):
        with pytest.raises(CorruptFileError, match=message):
            check(tmp_path / "file")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none")


@pytest.mark.parametrize(
    ("tensors", "modules", "message"),
    [
        ({"": torch.zeros(1)}, {}, "cannot be called ''"),
        ({"__metadata__": torch.zeros(1)}, {}, "cannot be called '__metadata__'"),
        ({"__manifest__": torch.zeros(1)}, {}, "cannot be called '__manifest__'"),
        ({"__F32__": torch.zeros(1)}, {}, "cannot be called '__F32__'"),
        ({3: torch.zeros(1)}, {}, "cannot be called 3"),
        ({"a": torch.zeros(1, device="meta")}, {}, "'a' cannot be stored: .* on meta"),
        ({"a": torch.zeros(2).to_sparse()}, {}, "'a' cannot be stored: .* torch.sparse_coo"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, {}, "torch.complex128"),
        ({}, {"m": {"f": 1}}, "module 'm' has no type"),
        ({}, {"m": {"type": "A", "f": object()}}, "modules must be JSON values"),
        ({}, {"m": {"type": "A", "f": float("nan")}}, "JSON"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(saved, tensors, modules, message):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=message):
        write(saved, tensors, modules)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(saved, call, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(container.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write(saved, {"a": torch.randn(1000)})
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_syncs_before_it_renames(saved, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(container.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        container.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))
    )
    write(saved, {"a": torch.randn(10)})
    assert calls == ["fsync", "replace", "fsync"]


def test_a_symbolic_link_stays_one(saved, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(saved.name)
    write(link, {"a": torch.zeros(1)})
    assert link.is_symlink()
    assert list(read(saved).tensors) == ["a"]


def test_inspect_shows_ideal_and_stored(saved):
    info = inspect(saved)
    assert info.header_bytes + sum(t.stored_nbytes for t in info.tensors) == info.file_bytes
    shown = str(info)
    for text in (
        "conv.weight",
        "6×8",
        "DynamicFixedPoint(bits=6)",
        "header",
        f"{info.file_bytes:,}",
    ):
        assert text in shown
    by_name = {t.name: t for t in info.tensors}
    packed = read(saved).packed["conv.weight"]
    assert by_name["conv.weight"].ideal_nbytes == packed.ideal_nbytes
    assert by_name["conv.weight"].stored_nbytes == packed.nbytes
    assert by_name["bn.half"].layout is None
    assert by_name["__F32__"].pooled == {"bn.bias": (3,), "bn.weight": (2,)}
    for text in ("2 small tensors", "  bn.bias", "  bn.weight"):
        assert text in shown
