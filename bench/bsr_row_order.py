"""What a GPU gains of rows of blocks in the order of `ops.bsr_row_order`.

    python bench/bsr_row_order.py --blocks runs/bert/minilm_blocks.safetensors

A block of threads of `bsr_linear` computes 128 outputs, and fetches x for each column that any of
its rows of blocks stores. "x" is the part of all columns that this union is, on average, "saved"
how much less it is in the order that a layer has of them on a GPU, and "traffic" what that leaves
of a step's bytes in 16 bits, the stored blocks included; "s" are the seconds that finding the
orders of all layers takes, on the CPU.

Masks of the encoder of MiniLM that `bench/bert_sst2.py minilm_blocks` trains, and, in blocks of
other sizes, those of its weights of greatest norm in each layer, which is no training; and random
ones, of as many blocks in each layer; and random ones of a large layer.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from bench_bert_speed import SHAPE, build
from bench_blocks_convert import trained
from common import parser, report
from torch import Tensor, nn

import compressops as co
from compressops.ops.bsr_row_order import TILE, columns_of_tiles

BYTES = 2


def norms(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Squared norms of the whole blocks of a matrix."""
    r, c = block
    rows, columns = weight.shape[0] // r, weight.shape[1] // c
    tiles = weight[: rows * r, : columns * c].reshape(rows, r, columns, c)
    return tiles.square().sum((1, 3))


def greatest(scores: Tensor, density: float) -> Tensor:
    least = scores.flatten().topk(round(density * scores.numel())).values.min()
    return scores >= least


def ordered(mask: Tensor, r: int) -> Tensor:
    """The rows of a mask as tiles shall take them."""
    sizes = (mask.shape[0] * r, mask.shape[1])
    _, crow, col = co.ops.bsr_from_dense(torch.empty(sizes, dtype=torch.bool), (r, 1), mask)
    order = co.ops.bsr_row_order(crow, col, (r, 1), *sizes)
    return mask if order is None else mask[order.long()]


def row(name: str, masks: list[Tensor], block: tuple[int, int]) -> dict:
    r, c = block
    began = time.perf_counter()
    likes = [ordered(mask, r) for mask in masks]
    seconds = time.perf_counter() - began
    unions = [sum(columns_of_tiles(m.numpy(), r) for m in each) for each in (masks, likes)]
    stored = sum(int(mask.sum()) for mask in masks)
    columns = sum(-(-len(mask) // (TILE // r)) * mask.shape[1] for mask in masks)
    # For as many rows of x as a block of threads has outputs.
    bytes_of = [union * TILE * c * BYTES + stored * r * c * BYTES for union in unions]
    return {
        **{"masks": name, "block": f"{r}×{c}"},
        "density": stored / sum(mask.numel() for mask in masks),
        "x": unions[0] / columns,
        "saved": 1 - unions[1] / unions[0],
        "traffic": bytes_of[1] / bytes_of[0],
        "s": seconds,
    }


def main() -> None:
    out = parser(__doc__, "bsr_row_order")
    out.add_argument("--blocks", type=Path, help="the trained file")
    arguments = out.parse_args()
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": 1} if arguments.smoke else SHAPE
    model = build(shape)
    if arguments.blocks:
        model = trained(arguments.blocks, model)
    layers = [
        module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".encoder." in f".{name}"
    ]
    name = "MiniLM" if arguments.blocks else "untrained"
    rows = []
    for block in ((16, 1), (16, 16), (32, 32), (64, 64)):
        scores = [norms(weight, block) for weight in layers]
        if block == (16, 1) and arguments.blocks:
            cases = {"trained": [score > 0 for score in scores]}
        else:
            densities = (0.2,) if block == (16, 1) else (0.1, 0.2, 0.5)
            cases = {f"greatest of {d:.0%}": [greatest(s, d) for s in scores] for d in densities}
        for case, masks in cases.items():
            rows.append(row(f"{name}, {case}", masks, block))
            random = [torch.rand(mask.shape) < mask.float().mean() for mask in masks]
            rows.append(row("random", random, block))
    size = 1024 if arguments.smoke else 8192
    for block in ((16, 16), (32, 32)):
        mask = torch.rand(size // block[0], size // block[1]) < 0.1
        rows.append(row(f"random, {size}²", [mask], block))
    report("Columns of x that a block of threads fetches", rows, arguments)


if __name__ == "__main__":
    main()
