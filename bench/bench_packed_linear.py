"""int4_linear and ternary_linear, quantization of x included, against what a PyTorch user can call.

    python bench/bench_packed_linear.py                     # torch alone
    python bench/bench_packed_linear.py --layers 4096 --m 1 8 128 --threads 2

`linear_peers.py` says what each peer's figure includes, and which packages they are of; groups of
128. "cold" rotates through weights that together exceed the caches; its GB/s are those of the
packed weights, beside the machine's read bandwidth.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from bench_int8_linear import ours as int8
from common import interleaved, measured_read_bandwidth, median_ratio, parser
from linear_bench import LAYERS, SETTLE, Layer, contestants, options, run
from linear_peers import FLOAT, INT4, Case, symmetric
from peers import Peer

import compressops as co

COLD_WEIGHTS = 64


def int4(case: Case, quantize_x: bool = True) -> Peer:
    N, K = case.weight.shape
    codes, scales = symmetric(case.weight.view(N, -1, case.group), 4)
    weight, scales, _ = co.ops.int4_linear_pack(
        codes.view(N, K), scales[..., 0].contiguous(), None, case.group
    )

    def run() -> torch.Tensor:
        return co.ops.int4_linear(
            case.x, weight, scales, None, N, case.group, quantize_x=quantize_x
        )

    return Peer(run, run, f"{weight.numel() + 4 * scales.numel()} bytes")


def ternary(case: Case) -> Peer:
    N = len(case.weight)
    threshold = 0.7 * case.weight.abs().mean(1, keepdim=True)
    codes = (case.weight.sign() * (case.weight.abs() > threshold)).to(torch.int8)
    kept = codes.abs().sum(1, keepdim=True).clamp(min=1)
    scales = (case.weight.abs() * codes.abs()).sum(1, keepdim=True) / kept
    weight, scales = co.ops.ternary_linear_pack(codes, scales)

    def run() -> torch.Tensor:
        return co.ops.ternary_linear(case.x, weight, scales, N)

    return Peer(run, run, f"{weight.numel() + 4 * scales.numel()} bytes")


OURS: dict[str, Callable[[Case], Peer]] = {
    "int4": int4,
    "int4, x in float32": lambda case: int4(case, quantize_x=False),
    "ternary": ternary,
    "int8": int8,
}


def row(layer: Layer, case: Case, seconds: dict[str, list[float]]) -> dict:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    found: dict = {}
    for op in ("int4", "ternary"):
        found |= {
            f"{op} µs": medians[op] * 1e6,
            f"{op} GOP/s": case.operations / medians[op] / 1e9,
        }
        for peer in ("int8", *FLOAT, *INT4):
            if peer in seconds:
                found[f"{op} × {peer}"] = median_ratio(seconds[peer], seconds[op])
    found["int4, x in float32 µs"] = medians["int4, x in float32"] * 1e6
    return found


def cold(layer: Layer, threads: int, rounds: int, smoke: bool) -> dict:
    """One row of activations, each call on other weights than the last 63."""
    rotations, sizes = {}, {}
    makers = {"int4": int4, "ternary": ternary, "onnxruntime int4": INT4["onnxruntime int4"]}
    for _ in range(2 if smoke else COLD_WEIGHTS):
        case = layer.case(1, threads)
        for name, peer in contestants(makers, case, 1.0)[0].items():
            rotations.setdefault(name, []).append(peer)  # which owns its buffers
            if peer.note.endswith(" bytes"):
                sizes[name] = int(peer.note.split()[0])
    cycles = {name: itertools.cycle(peers) for name, peers in rotations.items()}
    calls = {n: lambda c=c: next(c).run() for n, c in cycles.items()}
    seconds = interleaved(calls, rounds, settle=0.0 if smoke else SETTLE)
    found = {"layer": layer.name, "M": "1 cold", "K": layer.K, "N": layer.N, "threads": threads}
    for name, times in seconds.items():
        median = statistics.median(times)
        found[f"{name} µs"] = median * 1e6
        if name in sizes:
            found[f"{name} GB/s"] = sizes[name] / median / 1e9
    found["int4 × onnxruntime int4"] = (
        median_ratio(seconds["onnxruntime int4"], seconds["int4"])
        if "onnxruntime int4" in seconds
        else None
    )
    found["ternary × int4"] = median_ratio(seconds["int4"], seconds["ternary"])
    found["read GB/s"] = None if smoke else measured_read_bandwidth()
    return found


def main() -> None:
    arguments = options(parser(__doc__, "packed_linear-cpu"), LAYERS).parse_args()
    makers = {**OURS, **FLOAT, **INT4}
    title = "int4_linear, ternary_linear (CPU), × = times faster than the peer"
    # The rounding of weights to 2 bits.
    run(title, makers, row, 0.7, arguments, cold)


if __name__ == "__main__":
    main()
