"""int4_linear and ternary_linear, quantization of x included, against what torch has.

    python bench/bench_packed_linear.py

Peers: torch's float32 linear (MKL-packed where that is there), its 4-bit weights of groups of 128
(`_weight_int4pack_mm_for_cpu`, bfloat16 activations), and this project's int8_linear. "cold"
rotates through weights that together exceed the caches; its GB/s are those of the packed weights.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleaved, measured_read_bandwidth, median_ratio, parser, report

import compressops as co

SHAPES = [
    *((m, k, n) for k, n in ((384, 1536), (768, 3072), (4096, 4096)) for m in (1, 8, 64, 512)),
]
GROUP = 128
COLD_BYTES = 512 * 1024**2


def int4(k: int, n: int) -> tuple[Callable, int]:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    weight, scales, _ = co.ops.int4_linear_pack(codes, torch.rand(n, -(-k // GROUP)), None, GROUP)
    size = weight.numel() + 4 * scales.numel()
    return lambda x: co.ops.int4_linear(x, weight, scales, None, n, GROUP), size


def ternary(k: int, n: int) -> tuple[Callable, int]:
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    weight, scales = co.ops.ternary_linear_pack(codes, torch.rand(n, 1))
    return lambda x: co.ops.ternary_linear(x, weight, scales, n), weight.numel()


def torch_int4(k: int, n: int) -> Callable:
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(k // GROUP, n, 2).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scales)


def run_shape(m: int, k: int, n: int, rounds: int) -> dict:
    x, weight = torch.randn(m, k), torch.randn(n, k)
    int8_weight, sums = co.ops.int8_linear_pack(torch.randint(-127, 128, (n, k), dtype=torch.int8))
    scales = torch.rand(n)
    contestants = {
        "int4": int4(k, n)[0],
        "ternary": ternary(k, n)[0],
        "int8": lambda x: co.ops.int8_linear(x, int8_weight, scales, sums),
        "torch fp32": lambda x: F.linear(x, weight),
    }
    if k % GROUP == 0:
        contestants["torch int4"] = torch_int4(k, n)
    if torch.backends.mkl.is_available():
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, m)
        contestants["torch fp32"] = lambda x: torch.ops.mkl._mkl_linear(x, mkl, weight, None, m)
    seconds = interleaved({name: lambda c=call: c(x) for name, call in contestants.items()}, rounds)
    row = {"M": m, "K": k, "N": n}
    for op in ("int4", "ternary"):
        median = statistics.median(seconds[op])
        row |= {f"{op} µs": median * 1e6, f"{op} GOP/s": 2 * m * k * n / median / 1e9}
        for peer in ("int8", "torch fp32", "torch int4"):
            if peer in seconds:
                row[f"{op} × {peer}"] = median_ratio(seconds[peer], seconds[op])
    return row


def run_cold(k: int, n: int, rounds: int, total: int) -> dict:
    row, sizes, contestants = {"M": "1 cold", "K": k, "N": n}, {}, {}
    x = torch.randn(1, k)
    for op, make in (("int4", int4), ("ternary", ternary)):
        size = make(k, n)[1]
        copies = [make(k, n)[0] for _ in range(max(2, total // size))]
        rotation = itertools.cycle(copies)
        sizes[op], contestants[op] = size, lambda r=rotation: next(r)(x)
    seconds = interleaved(contestants, rounds)
    for op in contestants:
        median = statistics.median(seconds[op])
        row |= {f"{op} µs": median * 1e6, f"{op} GB/s": sizes[op] / median / 1e9}
    return row


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "packed_linear-cpu").parse_args()
    shapes = [(2, 128, 64)] if arguments.smoke else SHAPES
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in shapes:
            rows.append({"threads": threads, **run_shape(*shape, rounds)})
        cold = (64, 64, 1) if arguments.smoke else (4096, 4096, COLD_BYTES)
        found = run_cold(*cold[:2], rounds, cold[2])
        if not arguments.smoke:
            found["read GB/s"] = measured_read_bandwidth()
        rows.append({"threads": threads, **found})
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))
    rows = [{column: row.get(column, "–") for column in columns} for row in rows]
    report("int4_linear, ternary_linear (CPU), × = times faster than the peer", rows, arguments)


if __name__ == "__main__":
    main()
