"""int8_linear, quantization included, against what a PyTorch user can call on this machine.

    python bench/bench_int8_linear.py                       # torch alone
    python bench/bench_int8_linear.py --layers minilm --m 1 8 --threads 2

The layers of MiniLM and BERT-base and squares. `linear_peers.py` says what each peer's figure
includes, and which packages they are of (onnxruntime, onnx, openvino); what is missing is named.
Every result is compared with float64 before it is timed. "× best" is against the fastest integer
peer at that shape; GOP/s against the machine's measured vpdpbusd peak.
"""

from __future__ import annotations

import statistics

import torch
from common import median_ratio, parser
from linear_bench import LAYERS, Layer, options, run
from linear_peers import FLOAT, INT8, Case, symmetric
from peers import Peer

import compressops as co


def ours(case: Case) -> Peer:
    codes, scales = symmetric(case.weight, 8)
    packed, sums = co.ops.int8_linear_pack(codes)
    scales = scales[:, 0].contiguous()

    def run() -> torch.Tensor:
        return co.ops.int8_linear(case.x, packed, scales, sums)

    return Peer(run, run)


def row(layer: Layer, case: Case, seconds: dict[str, list[float]]) -> dict:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    found = {"ours µs": medians["ours"] * 1e6, "GOP/s": case.operations / medians["ours"] / 1e9}
    # It multiplies alone, so that it is no choice that a user has.
    rivals = [name for name in INT8 if name in medians and name != "torch._int_mm"]
    if rivals:
        best = min(rivals, key=medians.get)
        found |= {"best": best, "× best": median_ratio(seconds[best], seconds["ours"])}
    for name in (*FLOAT, *INT8):
        if name in seconds:
            found[f"× {name}"] = median_ratio(seconds[name], seconds["ours"])
    return found


def main() -> None:
    arguments = options(parser(__doc__, "int8_linear-cpu"), LAYERS).parse_args()
    makers = {"ours": ours, **FLOAT, **INT8}
    # The rounding of weights and activations to 8 bits, and of the peers' whole tensors.
    run("int8_linear (CPU), × = times faster than the peer", makers, row, 0.03, arguments)


if __name__ == "__main__":
    main()
