"""int8_linear, quantization included, against what a PyTorch user can call on this machine.

    python bench/bench_int8_linear.py

Peers: torch's float32 linear, its MKL-packed form, its dynamic int8 linear (the quantized engine of
the build) and `torch._int_mm` (the integer product alone, without quantization and scales).
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from common import interleaved, measured_fp32_peak, median_ratio, parser, report

import compressops as co

SHAPES = [(m, k, n) for k, n in ((384, 1536), (768, 3072), (4096, 4096)) for m in (1, 8, 64, 512)]


def quantized_dynamic(weight: torch.Tensor):
    packed = torch.ops.quantized.linear_prepack(
        torch.quantize_per_channel(
            weight, weight.abs().amax(1) / 127, torch.zeros(len(weight)), 0, torch.qint8
        ),
        None,
    )
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def run_shape(m: int, k: int, n: int, rounds: int) -> dict:
    x, weight = torch.randn(m, k), torch.randn(n, k)
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)
    packed, sums = co.ops.int8_linear_pack(codes)
    x_codes, transposed = co.ops.quantize_rows(x)[0], codes.t().contiguous()
    dynamic = quantized_dynamic(weight)
    contestants = {
        "ours": lambda: co.ops.int8_linear(x, packed, scales, sums),
        "torch fp32": lambda: F.linear(x, weight),
        "torch dynamic int8": lambda: dynamic(x),
        "torch._int_mm": lambda: torch._int_mm(x_codes, transposed),
    }
    if torch.backends.mkl.is_available():
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, m)
        contestants["torch fp32 packed"] = lambda: torch.ops.mkl._mkl_linear(
            x, mkl, weight, None, m
        )
    seconds = interleaved(contestants, rounds)
    ours = statistics.median(seconds["ours"])
    row = {"M": m, "K": k, "N": n, "ours µs": ours * 1e6, "GOP/s": 2 * m * k * n / ours / 1e9}
    for name in contestants:
        if name != "ours":
            row[f"× {name}"] = median_ratio(seconds[name], seconds["ours"])
    return row


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__, "int8_linear-cpu").parse_args()
    shapes = [(2, 64, 64)] if arguments.smoke else SHAPES
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        peak = 0.0 if arguments.smoke else measured_fp32_peak()
        for shape in shapes:
            rows.append(
                {"threads": threads, **run_shape(*shape, rounds), "fp32 peak GFLOP/s": peak}
            )
    report("int8_linear (CPU), × = times faster than the peer", rows, arguments)


if __name__ == "__main__":
    main()
