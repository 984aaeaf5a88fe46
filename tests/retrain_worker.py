"""Compresses a tiny network on made-up data; a process of its own, so that it can be killed.

python tests/retrain_worker.py WORKDIR OUT [pause in seconds after each step]
"""

from __future__ import annotations

import os
import sys
import time

import torch
from accelerate import PartialState
from torch import nn

from compressops.compress import Encode, Prune, Quantize, Recipe, Result, Retrain, compress
from compressops.distill import ActivationKD, AttentionMapKD, LogitsKD
from compressops.formats import DynamicFixedPoint, Huffman, Int

CLASSES = 6


class Points(torch.utils.data.Dataset):
    """Noisy points around one centre per class; the noise is new in each epoch."""

    def __init__(self, samples: int, shape: tuple[int, ...] = (12,), pause: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.centres = torch.randn(CLASSES, *shape, generator=generator)
        self.samples, self.pause, self.seed = samples, pause, 0

    def set_epoch(self, epoch: int, seed: int) -> None:
        self.seed = (seed + epoch) % 2**40

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.pause)
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        label = index % CLASSES
        noise = torch.randn(self.centres.shape[1:], generator=generator)
        return self.centres[label] + noise, label


class Sized(Points):
    """Points of which only the first ``size`` features are told; the others are 0."""

    size = 12

    def set_size(self, size: int) -> None:
        self.size = size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x, label = super().__getitem__(index)
        return torch.where(torch.arange(len(x)) < self.size, x, 0.0), label


def network(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)),
        nn.Linear(width, CLASSES),
    )


def recipe() -> Recipe:
    return Recipe(
        [
            Prune(0.4, schedule="surgery", updates=10),
            Retrain(
                epochs=2.5,
                batch_size=16,
                lr=0.05,
                ema=0.9,
                checkpoint_seconds=0.02,
                distill=(LogitsKD(2.0), ActivationKD("2")),
                image_sizes=((6, 0.5), (9, 0.5)),
            ),
            Quantize(DynamicFixedPoint(4)),
            Retrain(steps=12, batch_size=16, optimizer="muon", checkpoint_seconds=0.02),
            Encode(Huffman()),
        ]
    )


def compress_tiny(workdir: str, out: str, pause: float = 0.0) -> None:
    """The recipe on the tiny network; ``pause`` seconds for each sample."""
    torch.set_num_threads(1)
    model = network()
    result = compress(
        model, recipe(), Sized(160, pause=pause), Points(60), network(48), workdir, log=False
    )
    torch.save({"model": result.model.state_dict(), "history": result.history}, out)


def images_network(width: int = 8) -> nn.Module:
    """Without batch norm and dropout, whose results depend on how a batch is shared out."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * width, 6)),
    )


def distributed_recipe(accumulate: int = 1) -> Recipe:
    losses = LogitsKD(2.0), ActivationKD(("1", "3")), AttentionMapKD("1")
    training = {"batch_size": 24, "accumulate": accumulate, "distill": losses}
    return Recipe(
        [
            Prune(0.4, scope="global", schedule="cubic", updates=5),
            Retrain(epochs=2, lr=0.05, clip_grad_norm=1.0, **training),
            Quantize(Int(6), activations=Int(8)),
            Retrain(steps=5, lr=0.01, optimizer="muon", **training),
        ]
    )


def compress_images(accumulate: int = 1, workdir: str | None = None) -> Result:
    model = images_network()
    data = Points(96, (2, 6, 6)), Points(61, (2, 6, 6))
    teacher = images_network(12)
    return compress(model, distributed_recipe(accumulate), *data, teacher, workdir, log=False)


def main() -> None:
    """Every process writes its result, to compare them."""
    result = compress_images(workdir=sys.argv[1] + ".work")
    rows = [(row.top1, row.top5) for row in result.table]
    world = PartialState().num_processes
    state = {"model": result.model.state_dict(), "rows": rows, "world": world}
    torch.save(state, f"{sys.argv[1]}.{os.environ.get('RANK', 0)}")


if __name__ == "__main__":
    main()
