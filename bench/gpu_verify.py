"""What to run when there is a GPU: parity, the memory and race checkers, then the figures.

    python bench/gpu_verify.py              # all; writes bench/results/gpu.json
    python bench/gpu_verify.py --smoke      # parity alone, on what this machine has

Parity compares every backend with `eager` through the public ops. The same small cases then run
under each tool of compute-sanitizer, where that is installed. Figures are medians of replayed CUDA
graphs over buffers that together exceed the L2 cache, beside the measured copy bandwidth and bf16
matrix rate of the same GPU. docs/GPU_STATUS.md is filled in from what is printed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common import parser, report

import compressops as co
from compressops import backends
from compressops.formats.huffman import huffman_encode, huffman_lengths

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIZES = (0, 1, 7, 16, 17, 64, 129)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SHAPES = [(m, k, n) for k, n in ((768, 3072), (4096, 4096)) for m in (1, 16, 256, 4096)]


def int8_arguments(m: int, k: int, n: int, dtype: torch.dtype, activation: str = "none") -> tuple:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
    sums = weight.sum(1, dtype=torch.int32)
    x, scales = torch.randn(m, k, device=DEVICE).to(dtype), torch.rand(n, device=DEVICE) / 127
    return x, weight, scales, sums, torch.randn(n, device=DEVICE), activation


def huffman_arguments(count: int, chunk_size: int, bits: int = 6) -> tuple:
    symbols = (torch.randn(count) * 2 ** (bits - 3)).round().clamp(-(2 ** (bits - 1)))
    symbols = (symbols.to(torch.int16) & (2**bits - 1)).to(torch.uint8)
    lengths = huffman_lengths(torch.bincount(symbols.int(), minlength=2**bits), 12)
    lengths = torch.as_tensor(lengths, dtype=torch.uint8)
    stream, offsets = huffman_encode(symbols, lengths, chunk_size)
    return (*(part.to(DEVICE) for part in (stream, offsets, lengths)), count, chunk_size)


def cases(small: bool) -> Iterator[tuple[Callable, tuple]]:
    """Ops with their arguments."""
    sizes = (1, 17, 65) if small else SIZES
    for m, k, n in itertools.product(sizes, repeat=3):
        yield co.ops.int8_linear, int8_arguments(m, k, n, torch.float32)
    for dtype, activation in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), ("none", "relu", "gelu")
    ):
        yield co.ops.int8_linear, int8_arguments(130, 208, 140, dtype, activation)
    for count, chunk_size in ((1, 8), (3000, 1000)) if small else ((0, 8), (70_000, 4096)):
        yield co.ops.huffman_decode, huffman_arguments(count, chunk_size)


def parity(small: bool) -> list[dict]:
    """Largest difference from eager for each op and backend; raises where it is too large."""
    served = [
        (op, name)
        for op, device, name, reason in backends.table()
        if device == DEVICE.type and name != "eager" and reason is None
    ]
    worst = dict.fromkeys(served, 0.0)
    for op, arguments in cases(small):
        with co.backend("eager"):
            expected = op(*arguments)
        for name in (name for served_op, name in served if served_op in str(op)):
            with co.backend(name):
                actual = op(*arguments)
            torch.testing.assert_close(actual, expected)
            if actual.numel():
                difference = (actual.double() - expected.double()).abs().max().item()
                key = next(key for key in served if key[0] in str(op) and key[1] == name)
                worst[key] = max(worst[key], difference)
    return [
        {"op": op, "backend": name, "largest difference": value}
        for (op, name), value in worst.items()
    ]


def sanitize() -> None:
    """Every tool of compute-sanitizer over the small cases; raises on the first complaint."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: not run")
        return
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        subprocess.run([*command, __file__, "--smoke"], check=True, env=environment)
        print(f"compute-sanitizer {tool}: no errors")


def graph_seconds(calls: list[Callable[[], object]], rounds: int) -> float:
    """Median seconds of one call; the graph makes each of ``calls`` once."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_seconds(graph.replay, rounds) / len(calls)


def event_seconds(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[3:])


def limits(rounds: int) -> dict:
    """Copy bandwidth, GB/s, and bf16 matrix rate, TFLOP/s."""
    data = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(data)
    copy = graph_seconds([lambda: other.copy_(data)], rounds)
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    product = graph_seconds([lambda: a @ a], rounds)
    return {"copy GB/s": 2 * 2**30 / copy / 1e9, "bf16 TFLOP/s": 2 * 8192**3 / product / 1e12}


def int8_row(m: int, k: int, n: int, backend: str, rounds: int) -> dict:
    copies = max(1, min(64, 2 * torch.cuda.get_device_properties(0).L2_cache_size // (n * k)))
    sets = [int8_arguments(m, k, n, torch.bfloat16) for _ in range(copies)]
    dense = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
    with co.backend(backend):
        ours = graph_seconds([lambda s=s: co.ops.int8_linear(*s) for s in sets], rounds)
    peer = graph_seconds(
        [lambda s=s, w=w: F.linear(s[0], w) for s, w in zip(sets, dense, strict=True)], rounds
    )
    figure = {"µs": ours * 1e6, "TOP/s": 2 * m * k * n / ours / 1e12}
    return {
        **{"op": "int8_linear", "backend": backend, "case": f"{m}×{k}×{n} bf16"},
        **{**figure, "GB/s": (n * k + 2 * m * (n + k)) / ours / 1e9, "× peer": peer / ours},
        "peer": "torch bf16 linear",
    }


def huffman_row(bits: int, backend: str, rounds: int) -> dict:
    arguments = huffman_arguments(32_000_000, 4096, bits)
    with co.backend(backend):
        ours = event_seconds(lambda: co.ops.huffman_decode(*arguments), rounds)
    traffic = arguments[0].numel() + arguments[3]
    return {
        **{"op": "huffman_decode", "backend": backend, "case": f"32M symbols of {bits} bits"},
        **{"µs": ours * 1e6, "TOP/s": 0.0, "GB/s": traffic / ours / 1e9, "× peer": 0.0},
        "peer": "-",
    }


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__, "gpu").parse_args()
    torch.manual_seed(0)
    report("Parity with eager", parity(arguments.smoke), _quiet(arguments))
    if arguments.smoke:
        return
    if not GPU:
        sys.exit("gpu_verify.py: torch sees no CUDA device; --smoke runs what this machine can")
    sanitize()
    rounds = max(15, arguments.rounds)
    print(torch.cuda.get_device_name(), limits(rounds))
    names = [name for name in ("cuda", "triton") if _serves(name)]
    rows = [int8_row(*shape, name, rounds) for shape in SHAPES for name in names]
    rows += [huffman_row(bits, name, rounds) for bits in (4, 6, 8) for name in names]
    report(f"{torch.cuda.get_device_name()}, {limits(rounds)}", rows, arguments)


def _serves(name: str) -> bool:
    found = [row for row in backends.table() if row[1] == DEVICE.type and row[2] == name]
    return all(reason is None for *_, reason in found)


def _quiet(arguments):
    """The same options, but nothing is written."""
    quiet = type(arguments)(**vars(arguments))
    quiet.smoke = True
    return quiet


if __name__ == "__main__":
    main()
