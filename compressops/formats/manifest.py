"""What a file says of its tensors: the deflated JSON that is its last tensor."""

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
    MANIFEST,
    CorruptFileError,
    Entry,
    Header,
    UnsupportedFormatError,
    check_shape,
    deflate,
    digest,
    inflate,
    manifest_limit,
    to_json,
)
from compressops.formats.packed import PackedTensor
from compressops.formats.registry import UnknownTypeError, shown

FORMAT_VERSION = 1
# The oldest reader that reads what this version writes.
MIN_READER = 1

# What the header's metadata says, and what the manifest does.
VERSION_KEYS = {"format_version", "min_reader", "manifest"}
KEYS = {
    "formats",
    "packed",
    "plain",
    "pools",
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
        entries: the tensors of the file, without the manifest itself.
        nbytes: of the manifest in the file.
        packed: spec of each packed tensor, by name.
        encoded, decoded: hashes of each packed tensor's stored bytes and of what they decode to.
        plain: hash of each other tensor, by name.
        pools: tensor of the file, packed or not, that holds small ones: their names and shapes.
        aliases: further names of tensors in any of these, as tied weights have.
        modules: configs of the packed modules, by module name.
    """

    format_version: int
    min_reader: int
    entries: tuple[Entry, ...]
    nbytes: int
    packed: dict[str, dict[str, Any]]
    encoded: dict[str, str]
    decoded: dict[str, str]
    plain: dict[str, str]
    pools: dict[str, dict[str, list[int]]]
    aliases: dict[str, str]
    modules: dict[str, dict[str, Any]]


def build(
    specs: dict[str, dict[str, Any]],
    encoded: dict[str, str],
    decoded: dict[str, str],
    plain: list[str],
    pools: dict[str, dict[str, list[int]]],
    aliases: dict[str, str],
    modules: dict[str, Any],
    data: int,
) -> tuple[bytes, dict[str, Any]]:
    """The manifest of a file, and the metadata that vouches for it; see :class:`Manifest`.

    The axes of a packed tensor are those of many, and most options of a module those of most of
    its type: they are written once, so that the JSON stays small before it is deflated, too.

    Args:
        plain: by the order in the file.
        data: bytes of the tensors.

    Raises:
        ValueError: it is out of all proportion to the data.
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
    text = to_json(
        {
            "formats": formats,
            "packed": packed,
            "plain": plain,
            "pools": pools,
            "aliases": aliases,
            "defaults": defaults,
            "modules": {
                name: _without(config, defaults.get(config["type"], {}))
                for name, config in modules.items()
            },
        }
    )
    blob = deflate(text)
    if len(text) > (most := manifest_limit(data + len(blob), len(blob))):
        raise ValueError(
            f"the manifest of {data} bytes of data takes {len(text)}, more than {most}"
        )
    return blob, {
        "format_version": FORMAT_VERSION,
        "min_reader": MIN_READER,
        "manifest": digest(blob),
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


def read_manifest(file: BinaryIO, header: Header) -> Manifest:
    """The manifest of a file whose header was read; leaves ``file`` where the data begins.

    Raises:
        CorruptFileError: not what this module describes, or not of the header's tensors.
        UnsupportedFormatError: it asks for a newer reader.
    """
    metadata, newer = header.metadata, _check_version(header.metadata)
    *entries, last = header.entries or (None,)
    if last is None or last.name != MANIFEST or last.dtype != torch.uint8 or len(last.shape) != 1:
        raise CorruptFileError(f"the last tensor is {shown(last and last.name)}, no {MANIFEST!r}")
    file.seek(header.size + last.begin)
    blob = file.read(last.end - last.begin)
    if (actual := digest(blob)) != metadata["manifest"]:
        raise CorruptFileError(
            f"its manifest has hash {actual}, the header says {shown(metadata['manifest'])}"
        )
    data = inflate(blob, manifest_limit(last.end, len(blob)))
    file.seek(header.size)
    if not set(data) >= KEYS or (not newer and set(data) != KEYS):
        raise CorruptFileError(f"the manifest has {shown(sorted(data))}, expected {sorted(KEYS)}")
    for key in ("packed", "pools", "aliases", "defaults", "modules"):
        if not isinstance(data[key], dict):
            raise CorruptFileError(f"{key} is {shown(data[key])}")
    packed, encoded, decoded = _packed(entries, data)
    names = [entry.name for entry in entries if entry.name not in packed]
    hashes = data["plain"]
    if not isinstance(hashes, list) or len(hashes) != len(names):
        raise CorruptFileError(f"plain must be {len(names)} hashes, got {shown(hashes)}")
    stored = _check_pools(entries, packed, data["pools"])
    for alias, name in data["aliases"].items():
        if alias in stored or not isinstance(name, str) or name not in stored:
            raise CorruptFileError(f"alias {shown(alias)} of {shown(name)}")
    return Manifest(
        metadata["format_version"],
        metadata["min_reader"],
        tuple(entries),
        len(blob),
        packed,
        encoded,
        decoded,
        dict(zip(names, hashes, strict=True)),
        data["pools"],
        data["aliases"],
        _modules(data),
    )


def _check_version(metadata: dict[str, Any]) -> bool:
    """Whether the file is of a newer format, one that this reader may read."""
    for key in ("format_version", "min_reader"):
        if type(metadata.get(key)) is not int or metadata[key] < 1:
            raise CorruptFileError(f"{key} is {shown(metadata.get(key))}")
    if metadata["min_reader"] > FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"the file has format {shown(metadata['format_version'])} and needs a reader of format "
            f"{shown(metadata['min_reader'])}; this one reads up to format {FORMAT_VERSION}"
        )
    # A newer format that we may read can have keys that we need not know.
    newer = metadata["format_version"] > FORMAT_VERSION
    keys = set(metadata)
    if not keys >= VERSION_KEYS or (not newer and keys != VERSION_KEYS):
        expected = sorted(VERSION_KEYS)
        raise CorruptFileError(f"the metadata has {shown(sorted(metadata))}, expected {expected}")
    return newer


def _check_pools(
    entries: list[Entry], packed: dict[str, dict[str, Any]], pools: dict[str, Any]
) -> set[str]:
    """The names of all tensors, if each pool is one of ``entries`` and as large as its members."""
    by_name = {entry.name: entry for entry in entries}
    stored = set(by_name) - set(pools)
    for pool, shapes in pools.items():
        if pool not in by_name or not isinstance(shapes, dict):
            raise CorruptFileError(f"pool {shown(pool)} holds {shown(shapes)}")
        shape = packed[pool].get("shape") if pool in packed else list(by_name[pool].shape)
        total = sum(check_shape(name, member) for name, member in shapes.items())
        if shape != [total]:
            raise CorruptFileError(f"pool {pool!r} of shape {shown(shape)} holds {total} entries")
        if twice := stored & set(shapes):
            raise CorruptFileError(f"tensor {shown(min(twice))} is there twice")
        stored |= set(shapes)
    return stored


def _modules(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs, completed by what is written once for their type."""
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
    return modules


def _packed(
    stored: list[Entry], data: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, str]]:
    """Spec and hashes of each packed tensor, by name."""
    specs, encoded, decoded = {}, {}, {}
    formats = data["formats"]
    if not isinstance(formats, list) or any(
        not isinstance(axes, dict) or set(axes) != set(AXES) for axes in formats
    ):
        raise CorruptFileError(f"formats must be a list of {list(AXES)}, got {shown(formats)}")
    entries = {entry.name: entry for entry in stored}
    for name, value in data["packed"].items():
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
    total, size = 0, header.size + manifest.nbytes
    for entry in manifest.entries:
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
