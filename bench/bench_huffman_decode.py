"""huffman_decode on the codes of compressed networks, and bfloat16 weights, against general-purpose
decoders and zipnn.

    python bench/bench_huffman_decode.py

Each case is a block of at most 2 Mi distinct symbols, encoded once; what we decode is that block
again and again, to at least 16 Mi symbols, and our chunks lie in memory so often. A peer decodes
its one frame (which it finds in the cache) a quarter as often, and its time counts four times.

Each decoder makes the memory that it writes to, and the ratios are of that; "out=" is ours into a
buffer. glibc hands the peers' frames of 2 to 4 MB out again; a tensor of bfloat16 is new memory on
huge pages each time. With two threads the peers decode two frames at
a time.

The bfloat16 rows are whole weights, exponents decoded and merged with what is stored raw, the
others are symbols of a byte. CifarNet's codes are those of its float weights, pruned to 15.65 % by
magnitude and quantized, without retraining; layers share one table, so that the block is large.
"entropy" is that of order 0, "optimum" the best code of at most 12 bits without headers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import ROOT, interleaved, median_ratio, merged, parser, report
from peers import MissingError, imported
from safetensors.torch import load_file
from torch import Tensor

import compressops as co
from compressops.formats.coding import Huffman, unpack_bits
from compressops.formats.groupwise import Int
from compressops.formats.huffman import MAX_CHUNK_SIZE, huffman_lengths
from compressops.formats.layout import Sparse
from compressops.formats.number import DynamicFixedPoint
from compressops.formats.packed import PackedTensor
from compressops.formats.planes import split_planes
from compressops.ops import DECODER

BLOCK, TOTAL = 1 << 21, 1 << 24
DENSITY = 0.1565


@dataclass
class Case:
    """``data`` is what is coded: uint8 symbols of ``bits`` bits, or a bfloat16 weight."""

    name: str
    data: Tensor
    bits: int


def codes_of(weights: list[Tensor], number: Int | DynamicFixedPoint, sparse: bool = False) -> dict:
    """The symbols of each stream of the quantized weights, one after the other."""
    layout = Sparse("gaps") if sparse else None
    found: dict[str, list[Tensor]] = {}
    for weight in weights:
        packed = PackedTensor.pack(weight, layout, number, lossy=True)
        streams = packed.layout.streams(packed.shape, packed.meta, number.bits)
        for stream, (count, bits) in streams.items():
            found.setdefault(stream, []).append(unpack_bits(packed.parts[stream], count, bits))
    return {stream: torch.cat(symbols) for stream, symbols in found.items()}


def float_cases(name: str, values: Tensor) -> Iterator[Case]:
    values = values.bfloat16()
    exponents = split_planes(values.view(torch.int16), 16, turned=True)[1]
    yield Case(f"{name} exponents", exponents, 8)
    yield Case(f"{name} bfloat16", values, 16)


def cifarnet_cases() -> Iterator[Case]:
    tensors = load_file(ROOT / "recipes" / "cifarnet.safetensors")
    weights = [weight for weight in tensors.values() if weight.dim() == 4]
    sizes = torch.cat([weight.flatten() for weight in weights]).abs()
    limit = sizes.kthvalue(int((1 - DENSITY) * sizes.numel())).values
    pruned = [weight * (weight.abs() > limit) for weight in weights]
    for bits in (4, 6):
        streams = codes_of(pruned, DynamicFixedPoint(bits), sparse=True)
        yield Case(f"CifarNet codes, {bits} bits", streams["codes"], bits)
    yield Case("CifarNet gaps", streams["index"], 8)


def minilm_cases() -> Iterator[Case]:
    from compressops.zoo import minilm

    try:
        model, _ = minilm.load()
    except ImportError as error:
        print(f"left out: MiniLM: {error}")
        return
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for bits in (4, 8):
        yield Case(f"MiniLM Int {bits}", codes_of(weights, Int(bits))["codes"], bits)
    yield from float_cases("MiniLM", torch.cat([weight.flatten() for weight in weights]))


def cases(smoke: bool) -> Iterator[Case]:
    rows = 16 if smoke else BLOCK // 4096
    for bits in (4,) if smoke else (4, 6, 8):
        symbols = codes_of([torch.randn(rows, 4096)], Int(bits))["codes"]
        yield Case(f"Gaussian Int {bits}", symbols, bits)
    yield from float_cases("Gaussian", torch.randn(rows * 4096))
    if not smoke:
        yield from cifarnet_cases()
        yield from minilm_cases()


def optimum_and_entropy(symbols: Tensor) -> tuple[float, float]:
    """Bytes of the symbols in the best code of at most 12 bits, and by their entropy."""
    counts = torch.bincount(symbols.int())
    optimum = (counts * huffman_lengths(counts)).sum().item() / 8
    used = counts[counts > 0].double()
    return optimum, -(used * (used / used.sum()).log2()).sum().item() / 8


@dataclass
class Frame:
    """A peer's: ``decoder`` makes one, of so many threads where it ``has_threads`` itself."""

    data: bytes
    decoder: Callable[[int], Callable]
    has_threads: bool = False

    def repeated(self, copies: int, threads: int, pool: ThreadPoolExecutor) -> Callable[[], object]:
        """Decodes it ``copies`` times, shared among the threads of the pool."""

        def some(count: int) -> None:
            decode = self.decoder(threads)
            for _ in range(count):
                decode(self.data)

        if threads == 1 or self.has_threads:
            return lambda: some(copies)
        shares = [copies // threads + (i < copies % threads) for i in range(threads)]
        return lambda: list(pool.map(some, shares))


def frames_of(data: bytes, is_float: bool) -> dict[str, Frame]:
    """``data`` as each peer that is there stores it."""

    def zstd(level: int) -> Frame:
        library = imported("zstandard")
        frame = library.ZstdCompressor(level=level).compress(data)
        return Frame(frame, lambda _: library.ZstdDecompressor().decompress)

    def zlib() -> Frame:
        library, size = imported("zlib"), len(data)
        return Frame(library.compress(data, 6), lambda _: lambda f: library.decompress(f, 15, size))

    def brotli() -> Frame:
        library = imported("brotli")
        return Frame(library.compress(data, quality=9), lambda _: library.decompress)

    def zipnn() -> Frame:
        def made(threads: int) -> Any:
            return imported("zipnn").ZipNN(bytearray_dtype="bfloat16", threads=threads)

        # It reorders what it is given in place.
        frame = bytes(made(1).compress(bytearray(data)))
        return Frame(frame, lambda threads: made(threads).decompress, has_threads=True)

    makers = {
        "zstd-3": lambda: zstd(3),
        "zstd-19": lambda: zstd(19),
        "zlib-6": zlib,
        "brotli-9": brotli,
    }
    if is_float:
        makers["zipnn"] = zipnn
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except MissingError as error:
            print(f"left out: {error}")
            continue
        if bytes(found[name].decoder(1)(found[name].data)) != data:
            raise SystemExit(f"{name} does not give the data back")
    return found


def ours(case: Case, copies: int) -> tuple[Callable, Callable, int, float]:
    """Decoding of all copies into new memory, and into a buffer; the stored bytes of one copy, and
    seconds that packing takes on one thread, everything with it: the median of nine."""
    torch.set_num_threads(1)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        if case.bits == 16:
            packed = PackedTensor.pack(case.data, coding=Huffman(), encoder=co.ops.huffman_encode)
            parts = packed.parts
        else:
            parts = Huffman().encode(case.data, case.bits, "codes", co.ops.huffman_encode)
        seconds.append(time.perf_counter() - began)
    if not any(name.endswith("_lengths") for name in parts):
        raise SystemExit(f"{case.name} is not worth coding")
    count, stored = copies * case.data.numel(), sum(part.nbytes for part in parts.values())
    out = torch.empty(count, dtype=case.data.dtype)
    long = {n: part if n.endswith("_lengths") else part.repeat(copies) for n, part in parts.items()}
    if case.bits == 16:
        whole = replace(packed, shape=(count,), parts=long)

        def decode(out: Tensor | None = None) -> Tensor:
            return whole.unpack(DECODER, out)
    else:
        offsets = torch.nn.functional.pad(long["codes_sizes"].long().cumsum(0), (1, 0))
        lengths = unpack_bits(long["codes_lengths"], 2 * long["codes_lengths"].numel(), 4)
        code = long["codes"], offsets, lengths, count, MAX_CHUNK_SIZE

        def decode(out: Tensor | None = None) -> Tensor:
            return co.ops.huffman_decode(*code, out=out)

    expected = case.data.view(-1).repeat(copies)
    for decoded in (decode(), decode(out)):
        if not torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8)):
            raise SystemExit(f"{case.name} does not decode to itself")
    return decode, lambda: decode(out), stored, statistics.median(seconds)


def run_case(case: Case, threads: list[int], total: int, rounds: int) -> list[dict]:
    whole = case.data.numel() // MAX_CHUNK_SIZE * MAX_CHUNK_SIZE
    case = replace(case, data=case.data[: min(BLOCK, whole)])
    copies = -(-total // case.data.numel())
    fewer = -(-copies // 4)
    decode, decode_out, stored, encoding = ours(case, copies)
    if case.bits == 16:
        low, high = split_planes(case.data.view(torch.int16), 16, turned=True)
        optimum, entropy = (low.numel() + size for size in optimum_and_entropy(high))
    else:
        optimum, entropy = optimum_and_entropy(case.data)
    expected = case.data.repeat(copies)
    target, rows = torch.empty_like(expected), []
    peers = frames_of(case.data.view(torch.uint8).numpy().tobytes(), case.bits == 16)
    for count in threads:
        torch.set_num_threads(count)
        contestants = {"ours": decode, "out=": decode_out, "memcpy": lambda: target.copy_(expected)}
        with ThreadPoolExecutor(count) as pool:
            for name, frame in peers.items():
                contestants[name] = frame.repeated(fewer, count, pool)
            seconds = interleaved(contestants, rounds, settle=0.005 if count > 1 else 0.0)
        for name in peers:
            seconds[name] = [second * copies / fewer for second in seconds[name]]
        row = {
            "threads": count,
            "data": case.name,
            "distinct": case.data.numel(),
            "decoded": expected.numel(),
            "GB/s": expected.nbytes / statistics.median(seconds["ours"]) / 1e9,
            "GB/s, out=": expected.nbytes / statistics.median(seconds["out="]) / 1e9,
            "÷ entropy": stored / entropy,
            "÷ optimum": stored / optimum,
        }
        for name in ("memcpy", "zstd-3", "zstd-19", "zlib-6", "brotli-9", "zipnn"):
            there = name in seconds
            row[f"× {name}"] = median_ratio(seconds[name], seconds["ours"]) if there else "–"
        sizes = {name: len(peer.data) / stored for name, peer in peers.items()}
        row["peers' bytes ÷ ours"] = " ".join(f"{size:.3f}" for size in sizes.values())
        row["encoder MB/s"] = case.data.nbytes / encoding / 1e6
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__, "huffman_decode-cpu")
    options.add_argument("--only", default="", help="cases whose name has this in it")
    options.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = options.parse_args()
    torch.manual_seed(0)
    total = 4 * MAX_CHUNK_SIZE if arguments.smoke else TOTAL
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    rows = []
    for case in cases(arguments.smoke):
        if arguments.only in case.name:
            print(case.name, flush=True)
            rows += run_case(case, arguments.threads, total, rounds)
    rows = merged(rows, arguments, ("data", "threads"))
    rows.sort(key=lambda row: row["threads"])
    report("huffman_decode (CPU), × = times faster than the peer", rows, arguments)


if __name__ == "__main__":
    main()
