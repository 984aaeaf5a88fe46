"""Whole networks: what `compressops.convert` makes of them by measuring, against the original.

    python bench/bench_winograd_convert.py

The 13 convolutions of VGG16 at 224×224 with their ReLUs and pools, and CifarNet at 32×32; random
weights, eval mode, float32. Each is converted and timed in both memory formats, on inputs of that
format. × is the original's time over the converted model's, in the same format.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter

import torch
from common import interleaved, median_ratio, merged, parser, report
from torch import nn

import compressops as co
from compressops.zoo.cifarnet import CifarNet
from compressops.zoo.vgg16 import vgg16

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def chosen(model: nn.Module) -> str:
    """How many convolutions run as what."""
    tiles = [
        "direct" if getattr(module, "winograd", None) is None else f"F({module.winograd.tile},3)"
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    return ", ".join(f"{count} {tile}" for tile, count in sorted(Counter(tiles).items()))


def run(name: str, model: nn.Module, x: torch.Tensor, rounds: int) -> list[dict]:
    contestants, converted = {}, {}
    for kind, memory_format in FORMATS.items():
        original = copy.deepcopy(model).to(memory_format=memory_format)
        inputs = x.to(memory_format=memory_format)
        converted[kind] = co.convert(original, example_inputs=inputs)
        expected, actual = original(inputs), converted[kind](inputs)
        error = ((actual - expected).norm() / expected.norm()).item()
        if not error < 1e-4:
            raise SystemExit(f"{name}, {kind}: the converted model is off by {error:.1e}")
        contestants[kind] = lambda m=original, i=inputs: m(i)
        contestants[f"converted {kind}"] = lambda m=converted[kind], i=inputs: m(i)
    seconds = interleaved(contestants, rounds)
    return [
        {
            **{"network": name, "N": len(x), "format": kind},
            "original ms": statistics.median(seconds[kind]) * 1e3,
            "converted ms": statistics.median(seconds[f"converted {kind}"]) * 1e3,
            "×": median_ratio(seconds[kind], seconds[f"converted {kind}"]),
            "convolutions": chosen(converted[kind]),
        }
        for kind in FORMATS
    ]


@torch.inference_mode()
def main() -> None:
    out = parser(__doc__, "winograd_convert-cpu")
    out.add_argument("--nets", nargs="+", default=["vgg16", "cifarnet"])
    out.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    out.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = out.parse_args()
    torch.manual_seed(0)
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    width, size = (0.125, 32) if arguments.smoke else (1.0, 224)
    networks = {
        "vgg16": (lambda: nn.Sequential(*vgg16(width), nn.MaxPool2d(2)), size),
        "cifarnet": (lambda: CifarNet(width=width), 32),
    }
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for batch in [1] if arguments.smoke else arguments.batch:
            for name in arguments.nets:
                make, pixels = networks[name]
                found = run(name, make().eval(), torch.randn(batch, 3, pixels, pixels), rounds)
                rows += [{"threads": threads, **row} for row in found]
    rows = merged(rows, arguments, ("threads", "network", "N", "format"))
    report("convert, × = times faster than the original model", rows, arguments)


if __name__ == "__main__":
    main()
