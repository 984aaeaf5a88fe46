"""Peers of the Huffman ops on a GPU: DFloat11's decoder and those of nvCOMP, from device memory
to device memory.

Both are optional: what is not there, or fails, is left out with a printed reason. A machine without
network needs the wheels, installed with ``--no-deps``: dfloat11 0.5.0 (24 KB), nvidia-nvcomp-cu13
6.0.0.12 (4.2 MB) and nvidia-libnvcomp-cu13 6.0.0.12 (30 MB). DFloat11's module would import cupy
(70 MB) and transformers; its kernel is a file of PTX, which the driver loads without them.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peers import MissingError, imported
from torch import Tensor

from compressops.formats.huffman import huffman_lengths

# DFloat11's: bits that a thread decodes, threads of a block, and from which entry of a table on it
# is the number of another table, counted down from 256.
THREAD_BITS, BLOCK_THREADS, FIRST_TABLE = 64, 512, 240


@dataclass
class Peer:
    """``decode`` writes to ``out`` what ``stored`` bytes hold.

    ``kept`` is what it knows by address alone.
    """

    decode: Callable[[], object]
    out: Tensor
    stored: int
    kept: object = None


class DFloat11(NamedTuple):
    """A bfloat16 weight as DFloat11's kernel takes it; ``tables`` end with the codes' lengths."""

    tables: Tensor
    stream: Tensor
    sign_mantissa: Tensor
    positions: Tensor
    gaps: Tensor


def packed_bits(bits: Tensor) -> Tensor:
    """Bytes of bits, the first in the highest."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def dfloat11_tables(lengths: list[int]) -> tuple[Tensor, list[int]]:
    """Tables of 256 entries, by a code's first and second byte, and the canonical codes."""
    codes, code, last = [0] * len(lengths), 0, 0
    tables = [torch.zeros(256, dtype=torch.uint8)]
    second: dict[int, int] = {}
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code, last = code << (length - last), length
        codes[symbol], code = code, code + 1
        prefix, bits, table = codes[symbol], length, 0
        if length > 8:
            first, bits = prefix >> (length - 8), length - 8
            prefix &= (1 << bits) - 1
            if first not in second:
                second[first] = len(tables)
                tables.append(torch.zeros(256, dtype=torch.uint8))
                tables[0][first] = 256 - second[first]
            table = second[first]
        tables[table][prefix << (8 - bits) : (prefix + 1) << (8 - bits)] = symbol
    if len(second) > 256 - FIRST_TABLE:
        raise MissingError("the code needs more tables than it can number")
    return torch.stack([*tables, torch.tensor(lengths, dtype=torch.uint8)]), codes


def dfloat11_parts(weight: Tensor) -> DFloat11:
    """``weight`` (bfloat16) in DFloat11's format, with codes of at most 12 bits instead of 32.

    Its own encoder goes symbol by symbol in Python, which takes minutes for 256 MB.
    """
    values, device = weight.flatten().view(torch.int16), weight.device
    exponents = (values >> 7 & 255).to(torch.uint8)
    counts = torch.bincount(exponents.int(), minlength=256).cpu()
    if counts[FIRST_TABLE:].any():
        raise MissingError(f"it codes no exponents of {FIRST_TABLE} and more")
    # What follows the last code is the beginning of one that occurs nowhere else.
    end = int((counts == 0).nonzero()[0])
    counts[end] = 1
    lengths = huffman_lengths(counts)
    if lengths[end] < 8:
        raise MissingError("a code for the end of fewer than 8 bits could be decoded")
    tables, codes = dfloat11_tables(lengths.tolist())
    code, length = torch.tensor(codes, device=device), lengths.to(device).long()
    sizes = length[exponents.int()]
    starts = sizes.cumsum(0) - sizes
    total = int(starts[-1] + sizes[-1])
    size = -(-total // 8)
    bits = torch.zeros(8 * size, dtype=torch.uint8, device=device)
    for k in range(int(lengths.max())):
        there = sizes > k
        symbols = exponents[there].int()
        bits[starts[there] + k] = (code[symbols] >> (length[symbols] - 1 - k) & 1).to(torch.uint8)
    for k in range(8 * size - total):
        bits[total + k] = codes[end] >> (int(lengths[end]) - 1 - k) & 1
    if total % 8:  # the end's code begins somewhere too
        starts = torch.nn.functional.pad(starts, (0, 1), value=total)

    def firsts(window: int) -> tuple[Tensor, Tensor]:
        """Where windows of so many bits begin, and the first symbol that begins in each."""
        edges = torch.arange(0, int(starts[-1]) + 1, window, device=device)
        return edges, torch.searchsorted(starts, edges)

    blocks = -(-size // (BLOCK_THREADS * THREAD_BITS // 8))
    edges, first = firsts(THREAD_BITS)
    gaps = torch.zeros(blocks * BLOCK_THREADS, dtype=torch.uint8, device=device)
    gaps[: len(edges)] = (starts[first] - edges).to(torch.uint8)
    fives = gaps[:, None] >> torch.arange(4, -1, -1, dtype=torch.uint8, device=device) & 1
    positions = torch.full((blocks + 1,), weight.numel(), dtype=torch.int32, device=device)
    edges, first = firsts(BLOCK_THREADS * THREAD_BITS)
    positions[: len(edges)] = first.int()
    sign_mantissa = (values >> 8 & 0x80 | values & 0x7F).to(torch.uint8)
    return DFloat11(
        tables.to(device), packed_bits(bits), sign_mantissa, positions, packed_bits(fives)
    )


def dfloat11(weight: Tensor, stream: int) -> Peer:
    spec = importlib.util.find_spec("dfloat11")
    if spec is None or spec.origin is None:
        raise MissingError("it is not installed")
    parts, out = dfloat11_parts(weight), torch.empty_like(weight)
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: object) -> None:
        status = getattr(driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: CUDA error {status}")

    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoad", ctypes.byref(module), bytes(Path(spec.origin).with_name("decode.ptx")))
    call("cuModuleGetFunction", ctypes.byref(kernel), module, b"decode")
    sizes = len(parts.tables), parts.stream.numel(), weight.numel()
    values = [
        *(ctypes.c_uint64(tensor.data_ptr()) for tensor in (*parts, out)),
        *(ctypes.c_uint32(size) for size in sizes),
    ]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    # Of a block: a count for each thread, one of all, and the floats.
    shared = 4 * BLOCK_THREADS + 4 + 2 * int(parts.positions.diff().max())
    grid = parts.positions.numel() - 1, 1, 1, BLOCK_THREADS, 1, 1

    def decode() -> None:
        call("cuLaunchKernel", kernel, *grid, shared, ctypes.c_void_p(stream), pointers, None)

    return Peer(decode, out, sum(part.nbytes for part in parts), (parts, values))


def nvcomp(data: Tensor, stream: int, algorithm: str, **options: object) -> Peer:
    library = imported("nvidia.nvcomp")
    codec = library.Codec(algorithm=algorithm, cuda_stream=stream, **options)
    coded = codec.encode(library.as_array(data.view(torch.uint8), cuda_stream=stream))
    # With it and a buffer, decoding does not wait for the host.
    config, out = codec.decompression_config(coded), torch.empty_like(data)
    target = out.view(torch.uint8)
    return Peer(
        lambda: codec.decode(coded, out=target, decompression_config=config),
        out,
        coded.size * coded.item_size,
    )


def peers(data: Tensor, stream: int) -> dict[str, Peer]:
    """Those that can decode ``data``, a bfloat16 weight or uint8 symbols, on a CUDA stream, by name
    with their share of its bytes. nvCOMP takes a stream of its own where this is 0."""
    is_float = data.dtype == torch.bfloat16
    integers = {"data_type": "<u2" if is_float else "|u1"}
    makers: dict[str, Callable[[], Peer]] = {
        "nvCOMP ANS": lambda: nvcomp(data, stream, "ANS", data_type="|u1"),
        "nvCOMP GDeflate, entropy": lambda: nvcomp(data, stream, "GDeflate", algorithm_type=0),
        "nvCOMP Zstd": lambda: nvcomp(data, stream, "Zstd"),
        "nvCOMP Bitcomp": lambda: nvcomp(data, stream, "Bitcomp", **integers),
    }
    if is_float:
        makers["nvCOMP ANS, floats"] = lambda: nvcomp(data, stream, "ANS", data_type="<f2")
        makers = {"DFloat11": lambda: dfloat11(data, stream), **makers}
    found = {}
    for name, make in makers.items():
        try:
            peer = make()
            peer.decode()
            if not torch.equal(peer.out.view(torch.uint8), data.view(torch.uint8)):
                raise RuntimeError("it does not give the data back")
        except Exception as error:  # whatever a peer does, it must not cost our own figures
            print(f"left out: {name}: {error}")
            continue
        found[f"{name} ({peer.stored / data.nbytes:.3f})"] = peer
    return found
