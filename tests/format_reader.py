"""A second reader of the file format, written from docs/FORMAT.md alone: struct, json, zlib and
numpy."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib

import numpy as np


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read(data: bytes) -> dict[str, bytes]:
    """Name to row-major bytes (packed tensors decoded), every digest and hash checked."""
    (size,) = struct.unpack("<Q", data[:8])
    text, body = data[8 : 8 + size], data[8 + size :]
    header = json.loads(text)
    metadata = header.pop("__metadata__")
    stated = metadata["compressops_digest"]
    assert short_hash(text.replace(stated.encode(), b"0" * 16)) == stated
    version = json.loads(metadata["compressops"])
    assert version["min_reader"] <= 1
    name, entry = header.popitem()
    begin, end = entry["data_offsets"]
    assert name == "__manifest__"
    assert end == len(body)
    assert short_hash(body[begin:end]) == version["manifest"]
    manifest = json.loads(zlib.decompress(body[begin:end], wbits=-15))
    result, hashes, position = {}, iter(manifest["plain"]), 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == position
        position, blob = stop, body[start:stop]
        if (packed := manifest["packed"].get(name)) is None:
            assert short_hash(blob) == next(hashes)
            count = math.prod(entry["shape"])
        else:
            assert short_hash(blob) == packed["encoded"]
            spec = manifest["formats"][packed["format"]] | packed
            blob = to_bytes(decode(spec, split(blob, spec["parts"])), spec["dtype"])
            assert short_hash(blob) == packed["decoded"]
            count = math.prod(spec["shape"])
        if name in manifest["pools"]:
            result |= members(blob, count, manifest["pools"][name])
        else:
            result[name] = blob
    assert position == begin
    return result | {alias: result[name] for alias, name in manifest["aliases"].items()}


def members(blob: bytes, count: int, shapes: dict[str, list[int]]) -> dict[str, bytes]:
    """The tensors of a pool of ``count`` entries."""
    found, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * len(blob) // max(1, count)
        found[name] = blob[at : at + size]
        at += size
    assert at == len(blob)
    return found


def split(blob: bytes, sizes: dict[str, int]) -> dict[str, bytes]:
    parts = {}
    for name, size in sizes.items():
        parts[name], blob = blob[:size], blob[size:]
    return parts


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    """float32 values rounded to ``dtype``; a float that is stored as it is comes as its bits."""
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    if dtype == "float16":
        return values.astype("<f2").tobytes()
    bits = values.astype("<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def decode(spec: dict, parts: dict[str, bytes]) -> np.ndarray:
    """float32 [entries] of one packed tensor."""
    shape, layout, meta = spec["shape"], spec["layout"], spec["meta"]
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    number, coding = spec["number"], spec["coding"]
    bits = number.get("bits", 2)
    if number["type"] == "Float":
        bits = 32 if number["dtype"] == "float32" else 16
    if layout["type"] == "LowRank":
        names = [name for name in ("u", "core", "v") if name in meta]
        factors = {
            name: decode(
                meta[name],
                {n[len(name) + 1 :]: p for n, p in parts.items() if n.startswith(f"{name}_")},
            ).reshape(meta[name]["shape"])
            for name in names
        }
        return low_rank(layout["form"], shape, **factors).ravel()
    if layout["type"] == "Dense":
        where = np.arange(rows * columns)
        codes = stream(parts, "codes", rows * columns, bits, coding)
    elif layout["type"] == "Sparse":
        if layout["index"] == "bitmask":
            where = bitmask(parts, rows * columns, coding)
        else:
            gaps = stream(parts, "index", meta["gaps"], 8, coding)
            ends = np.cumsum(np.where(gaps < 255, gaps + 1, 255))
            where = ends[gaps < 255] - 1
        codes = stream(parts, "codes", meta["count"], bits, coding)
    else:
        (r, c), across = layout["block"], math.ceil(columns / layout["block"][1])
        blocks = bitmask(parts, math.ceil(rows / r) * across, coding)
        codes = stream(parts, "codes", meta["count"] * r * c, bits, coding)
        i = (blocks // across * r)[:, None, None] + np.arange(r)[:, None]
        j = (blocks % across * c)[:, None, None] + np.arange(c)
        inside = ((i < rows) & (j < columns)).ravel()
        where, codes = (i * columns + j).ravel()[inside], codes[inside]
    assert len(where) == len(codes)
    result = np.zeros(rows * columns, np.float32)
    turned = coding["type"] == "Huffman"
    result[where] = values(codes, where, number, bits, parts, columns, turned)
    return result


def low_rank(form: str, shape: list[int], u, v, core=None) -> np.ndarray:
    """float32 ``shape`` of float32 factors."""
    if form == "matrix":
        return product(u, v.reshape(len(v), -1)).reshape(shape)
    o, i, h, w = shape
    if form == "spatial":
        left = u[:, :, 0].transpose(0, 2, 1).reshape(o * w, -1)
        matrix = product(left, v.reshape(len(v), -1))
        return matrix.reshape(o, w, i, h).transpose(0, 2, 3, 1)
    if form == "tucker":
        inner = product(core.transpose(0, 2, 3, 1).reshape(-1, core.shape[1]), v)
        return product(u, inner.reshape(len(core), -1)).reshape(o, h, w, i).transpose(0, 3, 1, 2)
    inner = v[:, :, None] * core.reshape(len(core), 1, h * w)
    return product(u, inner.reshape(len(core), -1)).reshape(shape)


def product(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """float32 of the product in float64, summed in order."""
    total = np.zeros((len(u), v.shape[1]))
    for k in range(len(v)):
        total += u[:, k, None].astype(np.float64) * v[None, k].astype(np.float64)
    return total.astype(np.float32)


def bitmask(parts: dict[str, bytes], count: int, coding: dict) -> np.ndarray:
    mask = stream(parts, "index", math.ceil(count / 8), 8, coding).astype(np.uint8)
    flags = np.unpackbits(mask, bitorder="little")
    assert not flags[count:].any()
    return np.flatnonzero(flags)


def values(codes, where, number, bits, parts, columns, turned) -> np.ndarray:
    """float32 values of unsigned codes at the positions ``where``; those of floats may be turned:
    rotated left by one bit."""
    kind = number["type"]
    if kind == "Float":
        if turned:
            codes = codes >> 1 | (codes & 1) << (bits - 1)
        if number["dtype"] == "float32":
            return codes.astype("<u4").view("<f4")
        if number["dtype"] == "float16":
            return codes.astype("<u2").view("<f2").astype(np.float32)
        return (codes << 16).astype("<u4").view("<f4")
    q = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    if "Fixed" in kind:
        p = number["integer_bits"] if kind == "FixedPoint" else parts["integer_bits"]
        p = p if kind == "FixedPoint" else struct.unpack("<b", p)[0]
        return (q * 2.0 ** (p - bits)).astype(np.float32) + np.float32(0)
    scales = np.frombuffer(parts["scales"], "<f4")
    size = max(1, min(number["group_size"] or columns, columns))
    index = where // columns * math.ceil(columns / size) + where % columns // size
    index = index * (number.get("granularity") != "tensor")
    if not number.get("symmetric", True):
        q = q - np.frombuffer(parts["zeros"], np.int8)[index]
    return q.astype(np.float32) * scales[index] + np.float32(0)


def stream(parts, name, count, bits, coding) -> np.ndarray:
    """int64 unsigned codes of one stream."""
    if coding["type"] == "Huffman" and bits > 8:
        planes = [(8 * i, min(8, bits - 8 * i)) for i in range(math.ceil(bits / 8))]
        return sum(
            stream(parts, f"{name}_{i}", count, width, coding) << shift
            for i, (shift, width) in enumerate(planes)
        )
    if f"{name}_lengths" not in parts:
        return raw(parts[name], count, bits)
    lengths = raw(parts[f"{name}_lengths"], 2 * len(parts[f"{name}_lengths"]), 4)
    groups = prefixes(lengths)
    sizes = np.frombuffer(parts[f"{name}_sizes"], "<u2")
    symbols, position = [], 0
    for i, size in enumerate(sizes):
        chunk = parts[name][position : position + size]
        position += size
        assert zlib.crc32(chunk[4:]) == struct.unpack("<I", chunk[:4])[0]
        assert chunk[4] == 2
        left = np.unpackbits(np.frombuffer(chunk[5:], np.uint8), bitorder="little")
        symbol = np.full(min(coding["chunk_size"], count - i * coding["chunk_size"]), -1)
        length, prefix = 0, np.zeros(len(symbol), np.int64)
        while (symbol < 0).any():
            going_on = np.flatnonzero(symbol < 0)
            for j in going_on[np.argsort(prefix[going_on], kind="stable")]:
                group = groups.get((length, prefix[j]))
                width = 1 if group is None else len(group).bit_length() - 1
                value, left = left[:width] @ (1 << np.arange(width)), left[width:]
                if group is None:
                    prefix[j] = 2 * prefix[j] + value
                else:
                    symbol[j] = group[value]
            length += 1
        assert len(left) < 8
        assert not left.any()
        symbols += symbol.tolist()
    return np.array(symbols, np.int64)


def prefixes(lengths: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Length and value of each prefix, to the symbols of its group."""
    groups = []
    for length in range(1, 13):
        symbols = np.flatnonzero(lengths == length)
        for bits in range(8, -1, -1):
            if len(symbols) & 1 << bits:
                groups.append((length - bits, length, symbols[: 1 << bits]))
                symbols = symbols[1 << bits :]
    found, prefix, previous = {}, 0, 0
    for length, _, symbols in sorted(groups, key=lambda group: group[:2]):
        prefix <<= length - previous
        found[length, prefix], prefix, previous = symbols, prefix + 1, length
    return found


def raw(data: bytes, count: int, bits: int) -> np.ndarray:
    flags = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    assert not flags[count * bits :].any()
    return flags[: count * bits].reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))
