"""The safetensors container: a header that vouches for itself, and atomic writing.

Written and read here rather than by the ``safetensors`` library, which any file stays readable
by: byte-for-byte canonical output and the digest over the header are promises of our own format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from compressops.formats.registry import shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

METADATA_KEY = "compressops"
DIGEST_KEY = "compressops_digest"
# The last tensor of the file: what all the others are, as deflated JSON.
MANIFEST = "__manifest__"
HASH_LENGTH = 16
_ZEROS = b'"' + b"0" * HASH_LENGTH + b'"'
# The limit of the safetensors library.
MAX_HEADER = 100_000_000
# JSON takes some twenty times its size in memory: a header, and a manifest before it was deflated,
# have this much, and so much for each byte of data. (The smallest packed layers, of 30 bytes, have
# 15 bytes of manifest to a byte.)
FREE_HEADER = 1 << 22
HEADER_PER_BYTE = 16
FREE_MANIFEST = 1 << 16
MANIFEST_PER_BYTE = 64


# More than any layer has; safetensors files of others may have more, and are not read here.
MAX_DIMENSIONS = 64


class CorruptFileError(ValueError):
    """A file that is not what was saved: truncated, altered, or never whole.

    Attributes:
        tensors: names of the tensors that are wrong; empty where the header already is.
    """

    def __init__(self, message: str, tensors: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.tensors = tuple(tensors)


class UnsupportedFormatError(ValueError):
    """A whole file that this version cannot read: of a newer format, or of another program."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the container; ``begin`` and ``end`` count from the first data byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """``size`` is where the data begins: the 8 length bytes and the padded JSON."""

    size: int
    entries: tuple[Entry, ...]
    metadata: dict[str, Any]


def digest(data: bytes | memoryview) -> str:
    """SHA-256, the first 16 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:HASH_LENGTH]


def to_json(value: Any) -> str:
    """Compact JSON; NaN and infinities are refused, as JSON has none."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def deflate(text: str) -> bytes:
    """The text of a manifest, compressed as RFC 1951 says.

    Hashes aside it shrinks to a tenth: keys and names of layers repeat. (CifarNet's manifest takes
    1.2 KB instead of 5.2 KB.)
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    return packer.compress(text.encode()) + packer.flush()


def inflate(data: bytes, most: int) -> dict[str, Any]:
    """The JSON object of a deflated manifest.

    Raises:
        CorruptFileError: it is anything else, or takes more than ``most`` bytes before it was
            deflated.
    """
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One more: at the limit itself it would stop before the end of the stream.
        text = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise CorruptFileError(f"manifest is not deflated: {error}") from None
    if len(text) > most:
        raise CorruptFileError(f"manifest of {len(data)} bytes inflates to more than {most}")
    if not unpacker.eof or unpacker.unused_data:
        raise CorruptFileError(f"manifest of {len(data)} bytes does not end where it should")
    return parse_json(text, "manifest")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The object that ``text`` is.

    Raises:
        CorruptFileError: it is no JSON, has a key twice, NaN or infinity, or is no object.
    """
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{what} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{what} is no JSON object")
    return value


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, Any]
) -> bytes:
    """The bytes before the data, for tensors in the order of their data."""
    table: dict[str, Any] = {
        "__metadata__": {DIGEST_KEY: "0" * HASH_LENGTH, METADATA_KEY: to_json(metadata)}
    }
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = to_json(table).encode()
    # Data starts on a multiple of 8, as the safetensors library writes it.
    text += b" " * (-len(text) % 8)
    if len(text) > (most := header_limit(begin)):
        raise ValueError(f"the header of {begin} bytes of data takes {len(text)}, more than {most}")
    # The first one: __metadata__ is the first key, the digest the first in it.
    text = text.replace(_ZEROS, f'"{digest(text)}"'.encode(), 1)
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO, size: int) -> Header:
    """Parse and check the header of an open file of ``size`` bytes.

    Raises:
        CorruptFileError: anything but what :func:`build_header` writes.
        UnsupportedFormatError: a safetensors file of another program.
    """
    if size < 8:
        raise CorruptFileError(f"{size} bytes are too few for a header")
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8 or length > header_limit(size - 8 - length):
        raise CorruptFileError(f"header of {length} bytes in a file of {size}")
    text = file.read(length)
    table = parse_json(text, "header")
    metadata = _metadata(table)
    _check_digest(text, metadata[DIGEST_KEY])
    if not isinstance(metadata[METADATA_KEY], str):
        raise CorruptFileError(f"metadata is {shown(metadata[METADATA_KEY])}, no text")
    inner = parse_json(metadata[METADATA_KEY].encode(errors="replace"), "metadata")
    data = size - 8 - length
    entries = tuple(_entry(name, value, data) for name, value in table.items())
    begin = 0
    for entry in entries:
        if entry.begin != begin:
            raise CorruptFileError(
                f"tensor {shown(entry.name)} begins at {entry.begin}, "
                f"the one before ends at {begin}"
            )
        begin = entry.end
    if 8 + length + begin != size:
        raise CorruptFileError(f"{size} bytes, the header describes {8 + length + begin}")
    return Header(8 + length, entries, inner)


def header_limit(data: int) -> int:
    """Bytes that the header of ``data`` bytes may have."""
    return min(MAX_HEADER, FREE_HEADER + HEADER_PER_BYTE * data)


def manifest_limit(data: int, deflated: int) -> int:
    """Bytes of a manifest before it was deflated to ``deflated`` bytes, in a file of ``data``.

    Real ones shrink to a tenth. Deflate can do a thousandfold, and the objects that JSON describes
    take twenty times its bytes: a few kilobytes of file would cost a hundred megabytes.
    """
    return min(header_limit(data), FREE_MANIFEST + MANIFEST_PER_BYTE * deflated)


def _metadata(table: dict[str, Any]) -> dict[str, Any]:
    """Takes the metadata out of the header; one key of ours tells that the file is ours."""
    keys = {DIGEST_KEY, METADATA_KEY}
    metadata = table.pop("__metadata__", None)
    if isinstance(metadata, dict) and set(metadata) == keys:
        return metadata
    if isinstance(metadata, dict) and keys & set(metadata):
        for key in sorted(keys - set(metadata)):
            raise CorruptFileError(f"the metadata key {key!r} is missing or damaged")
        raise CorruptFileError(f"the metadata has keys {shown(sorted(metadata))}")
    if any(isinstance(value, dict) and keys & set(value) for value in table.values()):
        raise CorruptFileError("the header key '__metadata__' is missing or damaged")
    raise UnsupportedFormatError(
        f"no file of compressops: its metadata has no {METADATA_KEY!r} and {DIGEST_KEY!r}"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _refuse_constant(value: str) -> None:
    raise ValueError(f"{value} is no JSON")


def _check_digest(text: bytes, stated: Any) -> None:
    field = f'"{stated}"'.encode()
    actual = digest(text.replace(field, _ZEROS, 1))
    # Once: the strings inside the manifest are escaped, their quotes have a backslash.
    if len(field) != len(_ZEROS) or text.count(field) != 1 or stated != actual:
        raise CorruptFileError(f"header has digest {actual}, it says {shown(stated)}")


def _entry(name: str, value: Any, most: int) -> Entry:
    """The entry ``name`` of a header whose data has ``most`` bytes."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"tensor {shown(name)} is described by {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedFormatError(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    nbytes = check_shape(name, shape) * DTYPES[dtype].itemsize
    _check_numbers(name, "data_offsets", offsets, 2, most)
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CorruptFileError(
            f"tensor {shown(name)}: {dtype} {shown(shape)} takes {shown(nbytes)} bytes, "
            f"its offsets are {offsets}"
        )
    return Entry(name, DTYPES[dtype], tuple(shape), *offsets)


def check_shape(name: str, shape: Any) -> int:
    """The entries of a tensor of this shape.

    Raises:
        CorruptFileError: it is no list of sizes, or of more than torch can multiply.
    """
    _check_numbers(name, "shape", shape, MAX_DIMENSIONS, 2**62)
    # torch multiplies strides, which must not overflow for an empty tensor either.
    if math.prod(max(1, n) for n in shape) > 2**62:
        raise CorruptFileError(f"tensor {shown(name)} has shape {shown(shape)}, which is too large")
    return math.prod(shape)


def _check_numbers(name: str, what: str, numbers: Any, count: int, top: int) -> None:
    # Before anything is multiplied: the product of a million numbers takes minutes.
    if (
        not isinstance(numbers, list)
        or len(numbers) > count
        or any(type(n) is not int or not 0 <= n <= top for n in numbers)
    ):
        raise CorruptFileError(f"tensor {shown(name)} has {what} {shown(numbers)}")


def write_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview]) -> None:
    """Write beside ``path``, flush to the disk, rename: at any moment there is the old file or
    the whole new one. On an error the old file stays and nothing is left over."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    beside = os.path.join(folder, f".{os.path.basename(target)}.{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    if os.name == "posix":  # elsewhere a directory cannot be opened, nor need it be
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
