"""huffman_decode on codes like those of compressed networks, against general-purpose decoders.

    python bench/bench_huffman_decode.py

Symbols are k-bit quantized Gaussian weights. Peers: zlib of the standard library on the bit-packed
codes, and zstandard where it is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import zlib

import torch
from common import interleaved, median_ratio, parser, report

import compressops as co
from compressops.formats.huffman import huffman_encode, huffman_lengths


def gaussian_codes(bits: int, count: int) -> torch.Tensor:
    """uint8 two's-complement codes of Gaussian weights clipped at 4 standard deviations."""
    top = 2 ** (bits - 1) - 1
    codes = (torch.randn(count) * top / 4).round().clamp(-top - 1, top)
    return (codes.to(torch.int16) & (2**bits - 1)).to(torch.uint8)


def run_bits(bits: int, count: int, rounds: int) -> dict:
    symbols = gaussian_codes(bits, count)
    counts = torch.bincount(symbols.int(), minlength=2**bits)
    probabilities = counts[counts > 0] / count
    entropy = -(probabilities * probabilities.log2()).sum().item()
    lengths = torch.as_tensor(huffman_lengths(counts, 12), dtype=torch.uint8)
    stream, offsets = huffman_encode(symbols, lengths, 4096)
    assert torch.equal(co.ops.huffman_decode(stream, offsets, lengths, count, 4096), symbols)

    deflated = zlib.compress(symbols.numpy().tobytes(), 6)
    contestants = {
        "ours": lambda: co.ops.huffman_decode(stream, offsets, lengths, count, 4096),
        "zlib": lambda: zlib.decompress(deflated, bufsize=count),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        squeezed = zstandard.ZstdCompressor(level=3).compress(symbols.numpy().tobytes())
        contestants["zstandard"] = lambda: zstandard.ZstdDecompressor().decompress(squeezed)
    seconds = interleaved(contestants, rounds)
    ours = statistics.median(seconds["ours"])
    row = {
        "bits": bits,
        "symbols": count,
        "entropy": entropy,
        "bits/symbol": 8 * stream.numel() / count,
        "GB/s of symbols": count / ours / 1e9,
    }
    for name in contestants:
        if name != "ours":
            row[f"× {name}"] = median_ratio(seconds[name], seconds["ours"])
    return row


def main() -> None:
    arguments = parser(__doc__, "huffman_decode-cpu").parse_args()
    count = 10_000 if arguments.smoke else 16_000_000
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for bits in (4, 6, 8):
            rows.append({"threads": threads, **run_bits(bits, count, rounds)})
    report("huffman_decode (CPU), × = times faster than the peer", rows, arguments)


if __name__ == "__main__":
    main()
