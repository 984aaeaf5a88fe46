"""The Huffman ops on a GPU: small cases for `gpu_verify.py`, and its figures."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from gpu_cases import DEVICE, Check
from huffman_gpu_peers import peers
from torch import nn

import compressops as co
from compressops.formats.huffman import huffman_lengths
from compressops.formats.planes import code_dtype, split_planes

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Seconds = Callable[[Callable[[], object], int], float]


def encoded(symbols: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, ...]:
    """Stream, offsets and lengths, on the device."""
    lengths = huffman_lengths(torch.bincount(symbols, minlength=256))
    stream, offsets = co.ops.huffman_encode(symbols, lengths, chunk_size)
    return tuple(part.to(DEVICE) for part in (stream, offsets, lengths))


def decode_arguments(count: int, chunk_size: int, bits: int = 6) -> tuple:
    symbols = (torch.randn(count) * 2 ** (bits - 3)).round().clamp(-(2 ** (bits - 1)))
    symbols = (symbols.to(torch.int16) & (2**bits - 1)).to(torch.uint8)
    return *encoded(symbols, chunk_size), count, chunk_size


def planes_arguments(count: int, chunk_size: int, dtype: torch.dtype, coded: set[int]) -> tuple:
    """Of ``count`` Gaussian floats, whose planes ``coded`` are streams."""
    codes = torch.randn(count).to(dtype).view(code_dtype(8 * dtype.itemsize))
    none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    parts = [
        encoded(plane, chunk_size) if p in coded else [t.to(DEVICE) for t in (plane, *none)]
        for p, plane in enumerate(split_planes(codes, 8 * dtype.itemsize, turned=True))
    ]
    out = torch.zeros(count, dtype=dtype, device=DEVICE)
    return out, *map(list, zip(*parts, strict=True)), chunk_size, True


def decode_cases(small: bool) -> Iterator[Check]:
    for count, chunk_size in ((1, 8), (3000, 1000)) if small else ((0, 8), (70_000, 4096)):
        yield Check("huffman_decode", decode_arguments(count, chunk_size))


def planes_cases(small: bool) -> Iterator[Check]:
    for dtype in FLOATS:
        last = dtype.itemsize - 1
        for coded in ({last}, {0, last}, set()):
            for count, chunk_size in ((3001, 1000),) if small else ((0, 8), (70_001, 4096)):
                arguments = planes_arguments(count, chunk_size, dtype, coded)
                yield Check("huffman_decode_planes", arguments, writes=True)


def merge_cases(small: bool) -> Iterator[Check]:
    for dtype in FLOATS:
        for count in (1, 3001) if small else (0, 1_000_003):
            out, planes, *_ = planes_arguments(count, 1, dtype, set())
            yield Check("merge_planes", (out, planes, True), writes=True)


CASES = {
    "huffman_decode": decode_cases,
    "huffman_decode_planes": planes_cases,
    "merge_planes": merge_cases,
}


def row(op: str, backend: str, case: str, seconds: float, traffic: int) -> dict:
    return {
        **{"op": op, "backend": backend, "case": case, "µs": seconds * 1e6, "TOP/s": None},
        **{"GB/s": traffic / seconds / 1e9, "× peer": None, "peer": "-"},
    }


def with_peers(
    ours: dict, call: Callable[[], object], data: torch.Tensor, seconds: Seconds, rounds: int
) -> Iterator[dict]:
    """The row of ``ours``, and one for each peer that decodes ``data``, which ``call`` gives. Both
    are timed on one stream, and not on the default one, which nvCOMP takes for none."""
    yield ours
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for name, peer in peers(data, side.cuda_stream).items():
            mine, other = seconds(call, rounds), seconds(peer.decode, rounds)
            case = f"{ours['case']}, {name.partition(' (')[0]}"
            yield {**ours, "case": case, "× peer": other / mine, "peer": name}


def figures(event_seconds: Seconds) -> dict[str, Callable[[str, int], Iterator[dict]]]:
    """The figures of each op, for `gpu_verify.FIGURES`; GB/s are of what is read and written."""

    def decode_rows(backend: str, rounds: int) -> Iterator[dict]:
        for bits in (4, 6, 8):
            arguments = decode_arguments(32_000_000, co.Huffman().chunk_size, bits)
            traffic = arguments[0].numel() + arguments[3]
            with co.backend(backend):
                call = functools.partial(co.ops.huffman_decode, *arguments)
                ours = event_seconds(call, rounds)
                name = f"32M symbols of {bits} bits"
                first = row("huffman_decode", backend, name, ours, traffic)
                yield from with_peers(first, call, call(), event_seconds, rounds)

    def planes_rows(backend: str, rounds: int) -> Iterator[dict]:
        chunk_size = co.Huffman().chunk_size
        arguments = planes_arguments(1 << 27, chunk_size, torch.bfloat16, {1})
        out, planes, *_ = arguments
        traffic = sum(plane.numel() for plane in planes) + out.nbytes
        with co.backend(backend):
            call = functools.partial(co.ops.huffman_decode_planes, *arguments)
            ours = event_seconds(call, rounds)
            first = row("huffman_decode_planes", backend, "bf16 of 256 MB", ours, traffic)
            yield from with_peers(first, call, out, event_seconds, rounds)
            yield from layers_rows(backend, rounds)

    def layers_rows(backend: str, rounds: int) -> Iterator[dict]:
        """Layers that are decoded in each call, one after the other and ahead, beside decoded ones:
        with 256 rows the products take about as long as the decoding."""
        layers = nn.Sequential(*(nn.Linear(4096, 4096, dtype=torch.bfloat16) for _ in range(8)))
        x = torch.randn(256, 4096, dtype=torch.bfloat16, device=DEVICE)
        decoded = layers.to(DEVICE).eval()
        packed = co.convert(decoded, co.Huffman(), residency="packed")
        with torch.no_grad():
            expected, plain = decoded(x), event_seconds(lambda: decoded(x), rounds)
            for ahead in ("0", "1"):
                with mock.patch.dict(os.environ, {"COMPRESSOPS_DECODE_AHEAD": ahead}):
                    for _ in range(3):  # the second run knows the order
                        if not torch.equal(packed(x), expected):
                            raise AssertionError(f"packed layers differ, decode ahead {ahead}")
                    ours = event_seconds(lambda: packed(x), rounds)
                case = "8 packed layers of 4096² bf16, M = 256" + ", ahead" * (ahead == "1")
                traffic = sum(layer.weight.nbytes for layer in decoded)
                found = row("huffman_decode_planes", backend, case, ours, traffic)
                yield {**found, "× peer": plain / ours, "peer": "decoded layers"}

    def merge_rows(backend: str, rounds: int) -> Iterator[dict]:
        out, planes, *_ = planes_arguments(1 << 27, 1, torch.bfloat16, set())
        with co.backend(backend):
            ours = event_seconds(lambda: co.ops.merge_planes(out, planes, True), rounds)
        yield row("merge_planes", backend, "bf16 of 256 MB", ours, 2 * out.nbytes)

    return {
        "huffman_decode": decode_rows,
        "huffman_decode_planes": planes_rows,
        "merge_planes": merge_rows,
    }
