"""CifarNet, pruned in blocks of 16 outputs × 1 input: what `compressops.convert` makes of it.

    python bench/bench_blocks_convert.py

The trained network of recipes/cifarnet_blocks.yaml, eval mode, float32, in both memory formats.
`dense` is its float form as torch runs it, `winograd` what convert makes of that without knowing of
blocks, `blocks` what it makes of it with them. × is the time of dense, or of winograd, over that of
blocks, each in the format that is its fastest.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from pathlib import Path

import torch
from common import RESULTS, interleaved, median_ratio, parser, report
from torch import nn

import compressops as co
from compressops.compress import Prune
from compressops.formats import BlockSparse
from compressops.zoo.cifarnet import CifarNet

BLOCK = (16, 1)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def trained(path: Path, model: nn.Module) -> nn.Module:
    """The network of a file, with plain weights."""
    packed, plain = co.load(path, model), copy.deepcopy(model)
    state = {k: v for k, v in packed.state_dict().items() if k in plain.state_dict()}
    layers = dict(packed.named_modules())
    for name, layer in plain.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            state[f"{name}.weight"] = layers[name].weight
    plain.load_state_dict(state)
    return plain.eval()


def untrained(width: float) -> CifarNet:
    """A smaller one, of random blocks."""
    model = CifarNet(dropout=0.0, width=width)
    Prune(density=0.2, granularity="block", block=BLOCK).attach(model)
    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    return model.eval()


def chosen(model: nn.Module) -> str:
    """How many convolutions became what."""
    names = []
    for module in model.modules():
        if hasattr(module, "kernel_size"):
            winograd = getattr(module, "winograd", None)
            names.append(
                f"F({winograd.tile},3)"
                if winograd is not None
                else "blocks"
                if isinstance(module, co.nn.BlockSparseConv2d)
                else "direct"
            )
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items()))


def run(model: nn.Module, x: torch.Tensor, rounds: int) -> dict:
    contestants, became = {}, {}
    for kind, memory_format in FORMATS.items():
        dense = copy.deepcopy(model).to(memory_format=memory_format)
        inputs = x.to(memory_format=memory_format)
        models = {
            "dense": dense,
            "winograd": co.convert(dense, example_inputs=inputs),
            "blocks": co.convert(dense, BlockSparse(BLOCK), example_inputs=inputs),
        }
        expected = dense(inputs)
        for name, each in models.items():
            error = ((each(inputs) - expected).norm() / expected.norm()).item()
            if not error < 1e-4:
                raise SystemExit(f"{name}, {kind}: the converted model is off by {error:.1e}")
            contestants[name, kind] = lambda m=each, i=inputs: m(i)
            became[name, kind] = chosen(each)
    seconds = interleaved(contestants, rounds)
    best = {
        name: min(((name, kind) for kind in FORMATS), key=lambda k: statistics.median(seconds[k]))
        for name in models
    }
    return {
        "N": len(x),
        **{f"{n} ms": statistics.median(seconds[best[n]]) * 1e3 for n in models},
        **{
            f"× {n}": median_ratio(seconds[best[n]], seconds[best["blocks"]])
            for n in ("dense", "winograd")
        },
        "formats": ", ".join(best[n][1] for n in models),
        "winograd's": became[best["winograd"]],
        "blocks'": became[best["blocks"]],
    }


@torch.inference_mode()
def main() -> None:
    out = parser(__doc__, "blocks_convert-cpu")
    out.add_argument("--file", type=Path, default=RESULTS / "cifarnet_blocks.safetensors")
    out.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = out.parse_args()
    torch.manual_seed(0)
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    with torch.inference_mode(False):
        model = untrained(0.25) if arguments.smoke else CifarNet(dropout=0.0)
        model = model if arguments.smoke else trained(arguments.file, model)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for batch in [1] if arguments.smoke else arguments.batch:
            found = run(model, torch.randn(batch, 3, 32, 32), rounds)
            rows.append({"threads": threads, **found})
    report("block-sparse CifarNet, × = times faster", rows, arguments)


if __name__ == "__main__":
    main()
