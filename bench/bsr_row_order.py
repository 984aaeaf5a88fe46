"""What a GPU would gain of rows of blocks in an order by similarity.

    python bench/bsr_row_order.py --blocks runs/bert/minilm_blocks.safetensors

A block of threads of `bsr_linear` computes 128 outputs, and fetches x for each column that any of
its rows of blocks stores. "x" is the part of all columns that this union is, on average, "greedy"
and "swaps" how much less it is when similar rows stand together: each group begins with the
fullest row that is left and takes those that add the fewest columns; then rows of different groups
change places as long as that helps. "traffic" is what the second leaves of a step's bytes in 16
bits, the stored blocks included.

Masks of the encoder of MiniLM that `bench/bert_sst2.py minilm_blocks` trains, and, in blocks of
other sizes, those of its weights of greatest norm in each layer, which is no training; and random
ones, of as many blocks in each layer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from bench_bert_speed import SHAPE, build
from bench_blocks_convert import trained
from common import parser, report
from torch import Tensor, nn

OUTPUTS = 128  # of a block of threads
BYTES = 2


def norms(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Squared norms of the whole blocks of a matrix."""
    r, c = block
    rows, columns = weight.shape[0] // r, weight.shape[1] // c
    tiles = weight[: rows * r, : columns * c].reshape(rows, r, columns, c)
    return tiles.square().sum((1, 3))


def greatest(scores: Tensor, density: float) -> np.ndarray:
    least = scores.flatten().topk(round(density * scores.numel())).values.min()
    return (scores >= least).numpy()


def union(mask: np.ndarray, order: np.ndarray, group: int) -> int:
    padded = np.pad(mask[order], ((0, -len(mask) % group), (0, 0)))
    return int(padded.reshape(-1, group, mask.shape[1]).any(1).sum())


def greedy(mask: np.ndarray, group: int) -> np.ndarray:
    left, counts, order = np.arange(len(mask)), mask.sum(1), []
    while len(left):
        place = counts[left].argmax()
        columns = np.zeros(mask.shape[1], bool)
        for _ in range(min(group, len(left))):
            order.append(left[place])
            columns |= mask[left[place]]
            left = np.delete(left, place)
            added = (mask[left] & ~columns).sum(1)
            place = np.lexsort((-counts[left], added))[0] if len(left) else 0
    return np.array(order)


def swapped(mask: np.ndarray, order: np.ndarray, group: int, most: int = 20) -> np.ndarray:
    """Up to ``most`` times over all rows, or until no exchange of two helps."""
    order, places = order.copy(), np.arange(len(order))
    counts = np.add.reduceat(mask[order].astype(int), places[::group])
    for _ in range(most):
        before = order.copy()
        for place in places:
            mine, row = place // group, mask[order[place]]
            others = places[places // group != mine]
            if not len(others):
                break
            rest, theirs = counts[mine] - row, mask[order[others]]
            change = ((rest > 0) | theirs).sum(1) - (counts[mine] > 0).sum()
            change += (((counts[others // group] - theirs) > 0) | row).sum(1)
            change -= (counts[others // group] > 0).sum(1)
            best = change.argmin()
            if change[best] < 0:
                other, at = theirs[best].astype(int), others[best]
                counts[mine] += other - row
                counts[at // group] += row - other
                order[[place, at]] = order[[at, place]]
        if (order == before).all():
            break
    return order


def row(name: str, masks: list[np.ndarray], block: tuple[int, int]) -> dict:
    group = OUTPUTS // block[0]
    unions = np.zeros(3)
    for mask in masks:
        order = greedy(mask, group)
        orders = (np.arange(len(mask)), order, swapped(mask, order, group))
        unions += [union(mask, each, group) for each in orders]
    stored = sum(mask.sum() for mask in masks)
    columns = sum(-(-len(mask) // group) * mask.shape[1] for mask in masks)
    # For as many rows of x as a block of threads has outputs.
    bytes_of = unions * OUTPUTS * block[1] * BYTES + stored * block[0] * block[1] * BYTES
    return {
        **{"masks": name, "block": f"{block[0]}×{block[1]}"},
        "density": float(stored / sum(mask.size for mask in masks)),
        "x": float(unions[0] / columns),
        "greedy": float(1 - unions[1] / unions[0]),
        "swaps": float(1 - unions[2] / unions[0]),
        "traffic": float(bytes_of[2] / bytes_of[0]),
    }


def main() -> None:
    out = parser(__doc__, "bsr_row_order")
    out.add_argument("--blocks", type=Path, help="the trained file")
    arguments = out.parse_args()
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
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
            cases = {"trained": [(score > 0).numpy() for score in scores]}
        else:
            densities = (0.2,) if block == (16, 1) else (0.1, 0.2, 0.5)
            cases = {f"greatest of {d:.0%}": [greatest(s, d) for s in scores] for d in densities}
        for case, masks in cases.items():
            rows.append(row(f"{name}, {case}", masks, block))
            random = [generator.random(mask.shape) < mask.mean() for mask in masks]
            rows.append(row("random", random, block))
    report("Columns of x that a block of threads fetches", rows, arguments)


if __name__ == "__main__":
    main()
