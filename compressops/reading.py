"""Reading a file of packed and plain tensors, and the check of every byte of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from compressops import ops
from compressops.formats import pools
from compressops.formats.container import CorruptFileError, Entry, Header, digest, read_header
from compressops.formats.manifest import Manifest, check_work, naming, opened, read_manifest
from compressops.formats.packed import PackedTensor

Path = str | os.PathLike[str]

# Bytes from which a tensor is read into pages of its own.
_MAPPED = 1 << 18


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        tensors: those stored as they are, by name.
        packed: those stored packed, by name.
        aliases: further names of tensors in either, as tied weights have.
        modules: configs of the packed modules, by module name.
        format_version: of the file.
        file_bytes: its size.
        mapping: of the file, if the tensors are parts of it.
    """

    tensors: dict[str, Tensor]
    packed: dict[str, PackedTensor]
    aliases: dict[str, str]
    modules: dict[str, dict[str, Any]]
    format_version: int
    file_bytes: int
    mapping: mmap.mmap | None = None

    def release(self) -> None:
        """Give back to the system what is in memory of a mapped file: it comes from the file again
        when it is read, and what was written to the tensors is lost. For while nobody else has
        them."""
        _release(self.mapping)

    def settle(self) -> None:
        """`release`, and let the system read what is asked for from now on, and nothing around."""
        self.release()
        if self.mapping is not None and hasattr(mmap, "MADV_RANDOM"):
            self.mapping.madvise(mmap.MADV_RANDOM)


@dataclass(frozen=True)
class VerifyReport:
    """A file in which every byte is as it was saved."""

    path: str
    format_version: int
    tensors: int
    packed: int
    file_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.tensors} tensors, {self.packed} of them packed, all "
            f"{self.file_bytes:,} bytes as saved (format {self.format_version})"
        )


def read(
    path: Path,
    max_entries: Mapping[str, int] | None = None,
    *,
    decode: bool | Callable[[dict[str, Any]], bool] = True,
    mmap: bool = False,
) -> Contents:
    """Read a file written by `serialize.write` and check everything, what it decodes to included.

    Args:
        path: of the file.
        max_entries: entries that the packed tensor of a name may have in any case; see
            :meth:`PackedTensor.from_spec`.
        decode: ``False`` leaves out what packed tensors decode to, but for pools: every stored
            byte is checked all the same. A function is asked for each module that holds one, by
            its config; what no module holds is decoded.
        mmap: leave stored bytes in the file, mapped; what is written to them is not in the file.

    Raises:
        CorruptFileError: the file is not what was saved; lists every tensor that is wrong.
        UnsupportedFormatError: of a newer format, or of another program.
    """
    limits = max_entries or {}
    tensors: dict[str, Tensor] = {}
    packed: dict[str, PackedTensor] = {}
    problems: list[CorruptFileError] = []
    with opened(path) as (file, size):
        header = read_header(file, size)
        manifest = read_manifest(file, header)
        check_work(header, manifest, limits)
        decoded = _decoded(manifest, decode)
        mapping = _map(file, size) if mmap else None
        for entry in manifest.entries:
            name, pool = entry.name, manifest.pools.get(entry.name)
            # Read one by one: the file is never held twice.
            data = _read_bytes(file, entry) if mapping is None else _part(mapping, header, entry)
            try:
                with naming(name):
                    if name in manifest.plain:
                        _check_hash("stored", data, manifest.plain[name])
                        dense = _tensor(data, entry)
                    else:
                        _check_hash("stored", data, manifest.encoded[name])
                        found = PackedTensor.from_blob(
                            manifest.packed[name], _tensor(data, entry), limits.get(name)
                        )
                        if name in decoded or pool is not None:
                            dense = found.unpack(ops.DECODER)
                            _check_hash("decoded", bytes_of(dense), manifest.decoded[name])
            except CorruptFileError as error:
                problems.append(CorruptFileError(str(error), pool or [name]))
                continue
            _release(mapping)
            if pool is not None:
                tensors |= pools.split(dense, pool)
            elif name in manifest.plain:
                tensors[name] = dense
            else:
                packed[name] = found
        if problems:
            names = [name for problem in problems for name in problem.tensors]
            raise CorruptFileError("; ".join(map(str, problems)), names)
    return Contents(
        tensors, packed, manifest.aliases, manifest.modules, manifest.format_version, size, mapping
    )


def verify(path: Path, max_entries: Mapping[str, int] | None = None) -> VerifyReport:
    """Check every byte of a file: the digest of its header, the hash of each tensor's stored
    bytes, and the hash of what they decode to.

    Args:
        path: of the file.
        max_entries: entries that the packed tensor of a name may have in any case; see
            :meth:`PackedTensor.from_spec`.

    Raises:
        CorruptFileError: the file is not what was saved; lists every tensor that is wrong.
        UnsupportedFormatError: of a newer format, or of another program.
    """
    contents = read(path, max_entries)
    count = len(contents.tensors) + len(contents.packed)
    return VerifyReport(
        os.fspath(path), contents.format_version, count, len(contents.packed), contents.file_bytes
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, little-endian."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def _decoded(manifest: Manifest, decode: bool | Callable[[dict[str, Any]], bool]) -> set[str]:
    """The packed tensors that are to be decoded, by name."""
    if isinstance(decode, bool):
        return set(manifest.packed) if decode else set()
    decoded = set()
    for name, stored in ({name: name for name in manifest.packed} | manifest.aliases).items():
        config = manifest.modules.get(name.rpartition(".")[0])
        if config is None or decode(config):
            decoded.add(stored)
    return decoded


def _read_bytes(file: BinaryIO, entry: Entry) -> memoryview:
    """The next bytes of the file, which are those of ``entry``."""
    size = entry.end - entry.begin
    # Memory of the system's own, which has it back at once: what the allocator is given back in
    # such pieces it keeps, and a model of packed weights would take twice its size.
    # (Private: a fork has copies of the tensors that stay in it.)
    memory = bytearray(size) if size < _MAPPED else mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    data = memoryview(memory)
    if file.readinto(data) != size:
        raise CorruptFileError(f"ends inside tensor {entry.name!r}", [entry.name])
    return data


def _map(file: BinaryIO, size: int) -> mmap.mmap:
    # Private: tensors can be written to, and the file stays as it is.
    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def _part(mapping: mmap.mmap, header: Header, entry: Entry) -> memoryview:
    return memoryview(mapping)[header.size + entry.begin : header.size + entry.end]


def _release(mapping: mmap.mmap | None) -> None:
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _tensor(data: memoryview, entry: Entry) -> Tensor:
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.dtype == torch.bool and max(data) > 1:
        raise ValueError(f"a bool has the value {max(data)}")
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def _check_hash(what: str, data: memoryview, expected: object) -> None:
    if (actual := digest(data)) != expected:
        raise ValueError(f"its {what} bytes have hash {actual}, the file says {expected!r}")
