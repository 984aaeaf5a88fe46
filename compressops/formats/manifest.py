"""What a file says of its tensors: the JSON beside the safetensors header, and ``inspect``."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from compressops.formats.checks import entries_limit
from compressops.formats.container import (
    CorruptFileError,
    Header,
    UnsupportedFormatError,
    read_header,
    to_json,
)
from compressops.formats.packed import PackedTensor
from compressops.formats.registry import UnknownTypeError, shown

FORMAT_VERSION = 1
# The oldest reader that reads what this version writes.
MIN_READER = 1

KEYS = {
    "format_version",
    "min_reader",
    "formats",
    "packed",
    "plain",
    "aliases",
    "defaults",
    "modules",
}
# What of a packed tensor's spec is written once for all tensors that share it.
AXES = ("dtype", "layout", "number", "coding")
# Keys of a module's config that can be written once for its type. Without a limit a small file
# could name thousands of modules of thousands of keys each.
MAX_DEFAULTS = 16


@dataclass(frozen=True)
class Manifest:
    """The checked JSON of a file.

    Attributes:
        format_version, min_reader: of the file.
        packed: spec of each packed tensor, by name.
        encoded, decoded: hashes of each packed tensor's stored bytes and of what they decode to.
        plain: hash of each other tensor, by name.
        aliases: further names of tensors in either, as tied weights have.
        modules: configs of the packed modules, by module name.
    """

    format_version: int
    min_reader: int
    packed: dict[str, dict[str, Any]]
    encoded: dict[str, str]
    decoded: dict[str, str]
    plain: dict[str, str]
    aliases: dict[str, str]
    modules: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. ``layout``, ``number`` and ``coding`` are None where it is stored as
    it is; ``ideal_nbytes`` is the accounting of papers, ``stored_nbytes`` what the file spends."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str | None
    number: str | None
    coding: str | None
    density: float
    ideal_nbytes: float
    stored_nbytes: int


@dataclass(frozen=True)
class FileInfo:
    """``header_bytes`` and the tensors' ``stored_nbytes`` add up to ``file_bytes``."""

    path: str
    format_version: int
    min_reader: int
    tensors: tuple[TensorInfo, ...]
    aliases: dict[str, str]
    modules: dict[str, dict[str, Any]]
    header_bytes: int
    file_bytes: int

    def __str__(self) -> str:
        rows = [("tensor", "shape", "dtype", "as", "density", "ideal", "stored")]
        for t in self.tensors:
            how = " × ".join((t.layout, t.number, t.coding)) if t.layout else "plain"
            dtype = str(t.dtype).removeprefix("torch.")
            shape = "×".join(map(str, t.shape)) or "scalar"
            ideal, stored = f"{t.ideal_nbytes:,.0f}", f"{t.stored_nbytes:,}"
            rows.append((t.name, shape, dtype, how, f"{t.density:.4f}", ideal, stored))
        ideal = sum(t.ideal_nbytes for t in self.tensors)
        rows.append(("header", "", "", "", "", "", f"{self.header_bytes:,}"))
        rows.append(("file", "", "", "", "", f"{ideal:,.0f}", f"{self.file_bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                cell.rjust(width) if i > 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
        return "\n".join(lines)


def build(
    specs: dict[str, dict[str, Any]],
    encoded: dict[str, str],
    decoded: dict[str, str],
    plain: list[str],
    aliases: dict[str, str],
    modules: dict[str, Any],
) -> dict[str, Any]:
    """The JSON of a file; see :class:`Manifest`. ``plain`` goes by the order in the file.

    The axes of a packed tensor are those of many, and most options of a module those of most of
    its type: they are written once. (CifarNet's header takes 9 KB instead of 12 KB so.)
    """
    formats: list[dict[str, Any]] = []
    packed = {}
    for name, spec in specs.items():
        axes = {key: spec[key] for key in AXES}
        if axes not in formats:
            formats.append(axes)
        rest = {key: value for key, value in spec.items() if key not in AXES}
        hashes = {"encoded": encoded[name], "decoded": decoded[name]}
        packed[name] = {"format": formats.index(axes), **rest, **hashes}
    defaults = _defaults(modules)
    return {
        "format_version": FORMAT_VERSION,
        "min_reader": MIN_READER,
        "formats": formats,
        "packed": packed,
        "plain": plain,
        "aliases": aliases,
        "defaults": defaults,
        "modules": {
            name: _without(config, defaults.get(config["type"], {}))
            for name, config in modules.items()
        },
    }


def _without(config: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What of ``config`` is not in ``shared``; compared as JSON, where 1 is not true."""
    return {
        key: value
        for key, value in config.items()
        if key not in shared or to_json(shared[key]) != to_json(value)
    }


def _defaults(modules: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each type of module, the most frequent values of the options that all of them have."""
    by_type: dict[str, list[dict[str, Any]]] = {}
    for config in modules.values():
        by_type.setdefault(config["type"], []).append(config)
    defaults = {}
    for kind, configs in by_type.items():
        shared = [key for key in configs[0] if all(key in config for config in configs)]
        shared = [key for key in shared if key != "type"][:MAX_DEFAULTS]
        values = {key: Counter(to_json(config[key]) for config in configs) for key in shared}
        common = {key: counter.most_common(1)[0] for key, counter in values.items()}
        defaults[kind] = {
            key: json.loads(value) for key, (value, count) in common.items() if count > 1
        }
    return {kind: values for kind, values in defaults.items() if values}


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size; format errors inside the block are given the path."""
    with open(path, "rb") as file:
        try:
            yield file, os.fstat(file.fileno()).st_size
        except CorruptFileError as error:
            raise CorruptFileError(f"{os.fspath(path)}: {error}", error.tensors) from error
        except UnsupportedFormatError as error:
            raise UnsupportedFormatError(f"{os.fspath(path)}: {error}") from error


@contextlib.contextmanager
def naming(tensor: str) -> Iterator[None]:
    """Errors of a packed tensor inside the block become errors of the file that holds it."""
    try:
        yield
    except UnknownTypeError as error:
        raise UnsupportedFormatError(f"tensor {tensor!r}: {error}") from error
    except ValueError as error:
        raise CorruptFileError(f"tensor {tensor!r}: {error}", [tensor]) from error


def parse(header: Header) -> Manifest:
    """The manifest of a header.

    Raises:
        CorruptFileError: not what this module describes, or not of the header's tensors.
        UnsupportedFormatError: it asks for a newer reader.
    """
    data = header.metadata
    for key in ("format_version", "min_reader"):
        if type(data.get(key)) is not int or data[key] < 1:
            raise CorruptFileError(f"{key} is {shown(data.get(key))}")
    if data["min_reader"] > FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"the file has format {shown(data['format_version'])} and needs a reader of format "
            f"{shown(data['min_reader'])}; this one reads up to format {FORMAT_VERSION}"
        )
    # A newer format that we may read can have keys that we need not know.
    if not set(data) >= KEYS or (data["format_version"] == FORMAT_VERSION and set(data) != KEYS):
        raise CorruptFileError(f"the metadata has {shown(sorted(data))}, expected {sorted(KEYS)}")
    for key in ("packed", "aliases", "defaults", "modules"):
        if not isinstance(data[key], dict):
            raise CorruptFileError(f"{key} is {shown(data[key])}")
    packed, encoded, decoded = _packed(header)
    names = [entry.name for entry in header.entries if entry.name not in packed]
    hashes = data["plain"]
    if not isinstance(hashes, list) or len(hashes) != len(names):
        raise CorruptFileError(f"plain must be {len(names)} hashes, got {shown(hashes)}")
    stored = {*packed, *names}
    for alias, name in data["aliases"].items():
        if alias in stored or not isinstance(name, str) or name not in stored:
            raise CorruptFileError(f"alias {shown(alias)} of {shown(name)}")
    for kind, shared in data["defaults"].items():
        if not isinstance(shared, dict) or len(shared) > MAX_DEFAULTS:
            raise CorruptFileError(
                f"defaults of {shown(kind)} must be at most {MAX_DEFAULTS}, got {shown(shared)}"
            )
    modules = {}
    for name, config in data["modules"].items():
        kind = config.get("type") if isinstance(config, dict) else None
        if not isinstance(kind, str):
            raise CorruptFileError(f"module {name!r} has the config {shown(config)}")
        modules[name] = data["defaults"].get(kind, {}) | config
    return Manifest(
        data["format_version"],
        data["min_reader"],
        packed,
        encoded,
        decoded,
        dict(zip(names, hashes, strict=True)),
        data["aliases"],
        modules,
    )


def _packed(
    header: Header,
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, str]]:
    specs, encoded, decoded = {}, {}, {}
    formats = header.metadata["formats"]
    if not isinstance(formats, list) or any(
        not isinstance(axes, dict) or set(axes) != set(AXES) for axes in formats
    ):
        raise CorruptFileError(f"formats must be a list of {list(AXES)}, got {shown(formats)}")
    entries = {entry.name: entry for entry in header.entries}
    for name, value in header.metadata["packed"].items():
        entry = entries.get(name)
        if entry is None or entry.dtype != torch.uint8 or len(entry.shape) != 1:
            raise CorruptFileError(f"packed tensor {name!r} is no vector of bytes", [name])
        if not isinstance(value, dict) or not {"format", "encoded", "decoded"} <= set(value):
            raise CorruptFileError(f"packed tensor {name!r} is described by {shown(value)}", [name])
        spec = dict(value)
        encoded[name], decoded[name] = spec.pop("encoded"), spec.pop("decoded")
        index = spec.pop("format")
        if type(index) is not int or not 0 <= index < len(formats):
            raise CorruptFileError(f"packed tensor {name!r} has format {shown(index)}", [name])
        specs[name] = formats[index] | spec
    return specs, encoded, decoded


def check_work(header: Header, manifest: Manifest, max_entries: Mapping[str, int]) -> None:
    """Refuse a file whose tensors together take out of all proportion to decode, each of them
    within what is allowed for one; those within ``max_entries`` don't count.

    Raises:
        CorruptFileError: naming both numbers.
    """
    total, size = 0, header.size
    for entry in header.entries:
        size += (nbytes := entry.end - entry.begin)
        # What is wrong with one tensor is said where it is read, with all others.
        with contextlib.suppress(ValueError):
            if (spec := manifest.packed.get(entry.name)) is not None:
                work = PackedTensor.describe(spec).work(max_entries.get(entry.name, 0))
                total += work if work <= entries_limit(nbytes) else 0
    if total > (limit := entries_limit(size)):
        raise CorruptFileError(
            f"its {len(manifest.packed)} packed tensors take {total} entries' worth of work "
            f"together, more than the {limit} allowed for {size} bytes; max_entries raises the "
            f"limit"
        )


def inspect(path: str | os.PathLike[str]) -> FileInfo:
    """What a file holds and where its bytes go, from its header alone; nothing is decoded.

    Raises:
        CorruptFileError: truncated, or a header that is not what was saved.
        UnsupportedFormatError: of a newer format, or of another program.
    """
    with opened(path) as (file, size):
        header = read_header(file, size)
        manifest = parse(header)
        infos = []
        for entry in header.entries:
            nbytes = entry.end - entry.begin
            if entry.name in manifest.plain:
                plain = TensorInfo(
                    entry.name, entry.shape, entry.dtype, None, None, None, 1.0, nbytes, nbytes
                )
                infos.append(plain)
                continue
            with naming(entry.name):
                packed = PackedTensor.describe(manifest.packed[entry.name])
            axes = (str(axis) for axis in (packed.layout, packed.number, packed.coding))
            infos.append(
                TensorInfo(
                    entry.name,
                    packed.shape,
                    packed.dtype,
                    *axes,
                    packed.density,
                    packed.ideal_nbytes,
                    nbytes,
                )
            )
    return FileInfo(
        os.fspath(path),
        manifest.format_version,
        manifest.min_reader,
        tuple(infos),
        manifest.aliases,
        manifest.modules,
        header.size,
        size,
    )
