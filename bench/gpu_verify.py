"""What to run when there is a GPU: parity, the memory and race checkers, then the figures.

    python bench/gpu_verify.py              # all; writes bench/results/gpu.json
    python bench/gpu_verify.py --smoke      # parity alone, on what this machine has
    python bench/gpu_verify.py --ops int4_linear --steps parity time --total-seconds 120

Parity compares every backend with `eager` through the public ops. The same small cases then run
under each tool of compute-sanitizer, where that is installed. Figures are medians of replayed CUDA
graphs over buffers that together exceed the L2 cache, beside the measured copy bandwidth and bf16
matrix rate of the same GPU; where a row has a target, it says whether it is met. docs/GPU_STATUS.md
is filled in from what is printed.

All ends within `--total-seconds`, the CUDA kernels first, in the order of `CASES`: no step and no
op's figures take longer than `--max-seconds`, and what was left out is named. The file is written
after each op. Peers that may be missing are DFloat11 and nvCOMP, three wheels of 34 MB together
(`huffman_gpu_peers.py`); without them their rows are left out, with the reason. Rows of an earlier
run of the same file are kept with `--merge`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import bsr_gpu
import gpu_cases
import huffman_gpu
import torch
import torch.nn.functional as F
from common import merged, parser, report, write
from gpu_cases import (
    DEVICE,
    GPU,
    conv_arguments,
    int8_arguments,
    packed_arguments,
)

import compressops as co
from compressops import backends

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SHAPES = [
    (m, k, n) for k, n in ((768, 3072), (4096, 4096), (8192, 8192)) for m in (1, 16, 256, 4096)
]
CASES = gpu_cases.INTEGER_CASES | bsr_gpu.CASES | huffman_gpu.CASES | gpu_cases.OTHER_CASES
STEPS = ("parity", "sanitize", "time")
BACKENDS = ("cuda", "triton")
# By op and case, what has to be reached: percent of the bandwidth of a copy, and times the peer.
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("int4_linear", "1×16384×16384 bf16, A16"): {"% of copy": 88, "× peer": 3.5},
    ("int4_linear", "1×8192×8192 bf16, A16"): {"% of copy": 70, "× peer": 3.0},
    ("int4_linear", "1×4096×4096 bf16, A16"): {"% of copy": 45, "× peer": 2.0},
    ("int4_linear", "16×8192×8192 bf16, A16"): {"× peer": 2.7},
    **{("int4_linear", f"4096×{n}×{n} bf16, A16"): {"× peer": 0.95} for n in (4096, 8192, 16384)},
    ("ternary_linear", "1×16384×16384 bf16, A8"): {"× peer": 6.0},
    ("huffman_decode_planes", "bf16 of 256 MB, DFloat11"): {"× peer": 2.0},
    ("huffman_decode_planes", "bf16 of 256 MB, nvCOMP ANS"): {"× peer": 2.0},
    ("int8_linear", "4096×8192×8192 bf16"): {"× peer": 1.7},
    ("int8_linear", "4096×8192×8192 bf16, _int_mm"): {"× peer": 1.0},
}


# ---- parity and the checkers ---------------------------------------------------------------------


def kernels(op: str) -> list[str]:
    """The backends besides eager that serve an op here."""
    return [
        name
        for row_op, device, name, reason in backends.table()
        if (row_op, device, reason) == (op, DEVICE.type, None) and name != "eager"
    ]


def parity(ops: list[str], chosen: list[str], small: bool, max_seconds: float) -> list[dict]:
    """Largest difference from eager for each op and backend, over so many cases; raises where it is
    too large."""
    rows, deadline = [], time.monotonic() + max_seconds
    for op in ops:
        names = [name for name in kernels(op) if name in chosen]
        differences: dict[str, list[float]] = {name: [] for name in names}
        for case in CASES[op](small):
            if time.monotonic() > deadline:
                print(f"parity of {op}: cut short, its time is over")
                break
            expected = case.run("eager")
            for name in set(names).difference(case.refused_by):
                differences[name].append(case.compare(name, case.run(name), expected))
        rows += [
            {"op": op, "backend": name, "cases": len(all_), "largest difference": max(all_)}
            for name, all_ in differences.items()
            if all_
        ]
    return rows


def sanitize(ops: list[str], max_seconds: float) -> None:
    """Every tool of compute-sanitizer over the small cases of the CUDA kernels; raises on the first
    complaint."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: not run")
        return
    began = time.monotonic()
    for tool in SANITIZERS:
        left = max_seconds - (time.monotonic() - began)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            subprocess.run(
                [*command, __file__, "--smoke", "--backends", "cuda", "--ops", *ops],
                check=True,
                env=environment,
                timeout=max(left, 1),
            )
        except subprocess.TimeoutExpired:
            print(f"compute-sanitizer {tool}: cut short, its time is over; not finished")
        else:
            print(f"compute-sanitizer {tool}: no errors")


# ---- figures -------------------------------------------------------------------------------------


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


def int8_rows(backend: str, rounds: int) -> Iterator[dict]:
    for m, k, n in SHAPES:
        copies = max(1, min(64, 2 * torch.cuda.get_device_properties(0).L2_cache_size // (n * k)))
        sets = [int8_arguments(m, k, n, torch.bfloat16) for _ in range(copies)]
        dense = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
        with co.backend(backend):
            ours = graph_seconds([lambda s=s: co.ops.int8_linear(*s) for s in sets], rounds)
        peers = {
            "torch bf16 linear": [
                functools.partial(F.linear, s[0], w) for s, w in zip(sets, dense, strict=True)
            ]
        }
        if m > 16:  # fewer rows it refuses; without scales, bias and the quantization of x
            q = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE)
            peers["torch._int_mm"] = [functools.partial(torch._int_mm, q, s[1].t()) for s in sets]
        for name, calls in peers.items():
            yield {
                **{"op": "int8_linear", "backend": backend},
                "case": f"{m}×{k}×{n} bf16" + (", _int_mm" if name == "torch._int_mm" else ""),
                **{"µs": ours * 1e6, "TOP/s": 2 * m * k * n / ours / 1e12},
                "GB/s": (n * k + 2 * m * (n + k)) / ours / 1e9,
                **{"× peer": graph_seconds(calls, rounds) / ours, "peer": name},
            }


def conv_rows(backend: str, rounds: int) -> Iterator[dict]:
    """Layers of ResNet-50 and MobileNet, and a grouped one, against cuDNN in bf16, channels last;
    bytes are those of x, the weight and y."""
    layers = [
        *((c, c, size, 3, 1, 1) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
        *((256, 64, 56, 1, 1, 1), (64, 256, 56, 1, 1, 1), (3, 64, 224, 7, 2, 1)),
        *((128, 128, 56, 3, 1, 32), (512, 512, 14, 3, 1, 512)),
    ]
    for batch, (C, K, size, taps, stride, groups) in itertools.product((1, 32), layers):
        pair = [(stride, stride), (taps // 2, taps // 2), (1, 1)]
        shape, kernel = (batch, C, size, size), (taps, taps)
        sets = [conv_arguments(shape, K, kernel, (*pair, groups), torch.bfloat16) for _ in range(4)]
        dense = torch.randn(K, C // groups, *kernel, device=DEVICE, dtype=torch.bfloat16)
        dense = dense.contiguous(memory_format=torch.channels_last)
        with co.backend(backend):
            ours = graph_seconds(
                [functools.partial(torch.ops.compressops.int8_conv2d, *s) for s in sets], rounds
            )
        options = (None, *pair, groups)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            peers = [functools.partial(F.conv2d, s[0], dense, *options) for s in sets]
            peer = graph_seconds(peers, rounds)
        outputs = batch * K * (size // stride) ** 2
        products = outputs * C // groups * taps**2
        traffic = 2 * batch * C * size**2 + K * C // groups * taps**2 + 2 * outputs
        name = f"{C}→{K}@{size}, {taps}×{taps}/{stride}, groups {groups}, N = {batch}"
        yield {
            **{"op": "int8_conv2d", "backend": backend, "case": f"{name} bf16"},
            **{"µs": ours * 1e6, "TOP/s": 2 * products / ours / 1e12},
            **{"GB/s": traffic / ours / 1e9, "× peer": peer / ours, "peer": "cuDNN bf16"},
        }


def packed_rows(op: str, quantize_x: bool, backend: str, rounds: int) -> Iterator[dict]:
    """Groups of 128; bytes are those of codes, scales, x and y."""
    bits, call = 2 if op == "ternary_linear" else 4, getattr(torch.ops.compressops, op)
    for m, size in itertools.product((1, 16, 256, 4096), (4096, 8192, 16384)):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = max(1, min(64, 2 * cache * 8 // (bits * size**2)))
        mode = () if op == "ternary_linear" else (quantize_x,)
        sets = [
            (*packed_arguments(op, m, size, size, 128, torch.bfloat16), *mode)
            for _ in range(copies)
        ]
        dense = [
            torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)
        ]
        with co.backend(backend):
            ours = graph_seconds([functools.partial(call, *s) for s in sets], rounds)
        peers = [functools.partial(F.linear, s[0], w) for s, w in zip(sets, dense, strict=True)]
        peer = graph_seconds(peers, rounds)
        traffic = size**2 * (bits / 8 + 4 / 128) + 4 * m * size
        yield {
            **{"op": op, "backend": backend},
            "case": f"{m}×{size}×{size} bf16, {'A8' if quantize_x else 'A16'}",
            **{"µs": ours * 1e6, "TOP/s": 2 * m * size**2 / ours / 1e12},
            **{"GB/s": traffic / ours / 1e9, "× peer": peer / ours, "peer": "torch bf16 linear"},
        }


def int4_rows(backend: str, rounds: int) -> Iterator[dict]:
    for quantize_x in (False, True):
        yield from packed_rows("int4_linear", quantize_x, backend, rounds)


def winograd_rows(backend: str, rounds: int) -> Iterator[dict]:
    """Against cuDNN with benchmark=True, channels last; the kernels that it chose are the peer."""
    import winograd_gpu

    for kind, layer, batch, tile in winograd_gpu.cases():
        with co.backend(backend):
            row = winograd_gpu.run_layer(layer, batch, kind, rounds, tile)
        pixels = batch * (
            layer.size**2 * layer.C + (layer.size + 2 * layer.padding - 2) ** 2 * layer.K
        )
        size = torch.finfo(winograd_gpu.KINDS[kind][0]).bits // 8
        name = f"{layer.net} {layer.name} {layer.C}→{layer.K}@{layer.size}, N = {batch}"
        yield {
            **{"op": "winograd_conv2d", "backend": backend, "case": f"{name}, {kind}, tile {tile}"},
            **{"µs": row["ours µs"], "TOP/s": row["TFLOP/s"]},
            **{"GB/s": pixels * size / row["ours µs"] / 1e3, "× peer": row["× cuDNN"]},
            "peer": row["cuDNN's kernels"],
        }


FIGURES: dict[str, Callable[[str, int], Iterator[dict]]] = {
    "int8_linear": int8_rows,
    "int8_conv2d": conv_rows,
    "int4_linear": int4_rows,
    "ternary_linear": functools.partial(packed_rows, "ternary_linear", True),
    **huffman_gpu.figures(event_seconds),
    "winograd_conv2d": winograd_rows,
    **{op: bsr_gpu.rows(op, graph_seconds) for op in bsr_gpu.LINEAR},
    "bsr_conv2d": bsr_gpu.conv_rows(graph_seconds),
}


def until(rows: Iterable[dict], deadline: float, name: str) -> Iterator[dict]:
    """The rows that are there by the deadline."""
    for row in rows:
        yield row
        if time.monotonic() > deadline:
            print(f"{name}: cut short, its time is over, after {row['case']}")
            return


def judged(row: dict, copy: float) -> dict:
    """A row with its share of the bandwidth of a copy, and whether it reaches its target."""
    row = {**row, "% of copy": 100 * row["GB/s"] / copy}
    target = TARGETS.get((row["op"], row["case"]), {})
    met = all(row[column] >= least for column, least in target.items())
    text = ", ".join(f"{column} ≥ {least:g}" for column, least in target.items())
    return {**row, "target": text, "met": ("yes" if met else "NO") if target else ""}


def figures(arguments, rounds: int, limit: dict, deadline: float) -> None:
    """All ops' figures, the CUDA kernels' first; the file has them after each op."""
    title, rows = f"{torch.cuda.get_device_name()}, {limit}", []
    served = [
        (op, backend)
        for backend, op in itertools.product(arguments.backends, arguments.ops)
        if op in FIGURES and (op, DEVICE.type, backend, None) in backends.table()
    ]
    if not served:
        sys.exit(f"gpu_verify.py: no kernel of {', '.join(arguments.ops)} serves on this GPU")
    for done, (op, backend) in enumerate(served):
        # What others leave may be used: most take less than their part.
        name, left = f"{op} on {backend}", deadline - time.monotonic()
        if left <= 0:
            print(f"{name}: left out, --total-seconds are over")
            continue
        part = min(arguments.max_seconds, 3 * left / (len(served) - done))
        for row in until(FIGURES[op](backend, rounds), time.monotonic() + part, name):
            rows.append(judged(row, limit["copy GB/s"]))
        write(title, merged(rows, arguments, ("op", "backend", "case")), arguments)
    if rows:
        report(title, rows, _quiet(arguments))


def options() -> argparse.ArgumentParser:
    out = parser(__doc__, "gpu")
    out.add_argument("--ops", nargs="+", default=list(CASES), choices=list(CASES))
    out.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    out.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    out.add_argument("--max-seconds", type=float, default=120, help="of a step; of an op's figures")
    out.add_argument("--total-seconds", type=float, default=560, help="of all together")
    out.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    return out


@torch.no_grad()
def main() -> None:
    arguments = options().parse_args()
    deadline = time.monotonic() + arguments.total_seconds

    def step_seconds() -> float:
        return min(arguments.max_seconds, deadline - time.monotonic())

    torch.manual_seed(0)
    for op in arguments.ops:
        if not kernels(op):
            print(f"{op}: no kernel on {DEVICE.type}, left out")
    arguments.ops = [op for op in arguments.ops if kernels(op)]
    if not arguments.ops:
        return
    chosen = arguments.backends if GPU else ["cpu", *arguments.backends]
    if "parity" in arguments.steps or arguments.smoke:
        seconds = float("inf") if arguments.smoke else step_seconds()
        rows = parity(arguments.ops, chosen, arguments.smoke, seconds)
        if rows:
            report("Parity with eager", rows, _quiet(arguments))
    if arguments.smoke:
        return
    if not GPU:
        sys.exit("gpu_verify.py: torch sees no CUDA device; --smoke runs what this machine can")
    if "sanitize" in arguments.steps:
        sanitize(arguments.ops, step_seconds())
    if "time" in arguments.steps:
        rounds = max(15, arguments.rounds)
        limit = limits(rounds)
        print(torch.cuda.get_device_name(), limit)
        figures(arguments, rounds, limit, deadline)


def _quiet(arguments):
    """The same options, but nothing is written."""
    quiet = type(arguments)(**vars(arguments))
    quiet.smoke = True
    return quiet


if __name__ == "__main__":
    main()
