"""A training step of CifarNet on a CPU: direct convolutions, and Retrain(convolutions="winograd").

    python bench/bench_training.py --batch 500

Forward, backward and nothing else; images in channels_last, as `Retrain` feeds them.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleaved, median_ratio, parser, report

from compressops.train.convolutions import winograd_convolutions
from compressops.zoo.cifarnet import CifarNet

MACS = 174e6  # an image of 32 × 32, forward


def step(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        F.cross_entropy(model(x), labels).backward()

    return run


def main() -> None:
    options = parser(__doc__.splitlines()[0], "training")
    options.add_argument("--batch", type=int, default=500)
    arguments = options.parse_args()
    batch, rounds = (8, 1) if arguments.smoke else (arguments.batch, arguments.rounds)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (batch,))
        direct = CifarNet(dropout=0.0).train()
        winograd = copy.deepcopy(direct)
        with winograd_convolutions(winograd):
            contestants = {
                "direct": step(direct, x, labels),
                "winograd": step(winograd, x, labels),
            }
            times = interleaved(contestants, rounds)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rows.append(
                {
                    "threads": threads,
                    "batch": batch,
                    "convolutions": name,
                    "seconds": median,
                    "GFLOP/s (direct)": 6 * MACS * batch / median / 1e9,
                    "× direct": median_ratio(times["direct"], seconds),
                }
            )
    report("A training step of CifarNet", rows, arguments)


if __name__ == "__main__":
    main()
