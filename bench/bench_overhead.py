"""What a public op costs over its kernel: at most 10 µs a call are allowed.

python bench/bench_overhead.py
"""

from __future__ import annotations

import statistics

import torch
from common import interleaved, parser, report

import compressops as co
from compressops import schema
from compressops.formats.huffman import huffman_encode_reference


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__, "overhead-cpu").parse_args()
    torch.set_num_threads(1)
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    weight = torch.randint(-127, 128, (16, 16), dtype=torch.int8)
    packed, sums = co.ops.int8_linear_pack(weight)
    lengths = torch.ones(1, dtype=torch.uint8)
    stream, offsets = huffman_encode_reference(torch.zeros(1, dtype=torch.uint8), lengths, 64)
    filters, image = torch.randn(16, 16, 3, 3), torch.randn(1, 16, 4, 4)
    transformed = co.ops.winograd_conv2d_pack(filters, tile=2)
    calls = {
        "int8_linear": (torch.randn(1, 16), packed, torch.ones(16), sums, None, "none"),
        "huffman_decode": (stream, offsets, lengths, 1, 64),
        "winograd_conv2d": (image, filters, None, [1, 1], 1, "none", 2, transformed),
    }
    rows = []
    for op, args in calls.items():
        public, native = getattr(co.ops, op), schema.native_op(op)
        kernel_args = args
        if op == "winograd_conv2d":  # the one whose kernel takes its arguments in another order
            kernel_args = (image, filters, transformed, None, [1, 1], 1, "none", 2)
        seconds = interleaved(
            {
                "public": lambda p=public, a=args: p(*a),
                "kernel": lambda n=native, a=kernel_args: n(*a),
            },
            rounds,
        )
        micros = {name: statistics.median(times) * 1e6 for name, times in seconds.items()}
        rows.append(
            {
                "op": op,
                "public µs": micros["public"],
                "kernel µs": micros["kernel"],
                "overhead µs": micros["public"] - micros["kernel"],
            }
        )
    report("Overhead of a public op over its kernel (eager)", rows, arguments)


if __name__ == "__main__":
    main()
