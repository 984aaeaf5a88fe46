"""Compresses a tiny network on made-up data; a process of its own, so that it can be killed.

python tests/retrain_worker.py WORKDIR OUT [pause in seconds after each step]
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from compressops.compress import Encode, Prune, Quantize, Recipe, Retrain, compress
from compressops.distill import LogitsKD
from compressops.formats import DynamicFixedPoint
from compressops.formats.coding import Huffman

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


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, CLASSES)
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
                distill=(LogitsKD(2.0),),
            ),
            Quantize(DynamicFixedPoint(4)),
            Retrain(steps=12, batch_size=16, optimizer="muon", checkpoint_seconds=0.02),
            Encode(Huffman()),
        ]
    )


def main() -> None:
    workdir, out = sys.argv[1:3]
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    model = network()
    result = compress(
        model, recipe(), Points(160, pause=pause), Points(60), model, workdir, log=False
    )
    torch.save(result.model.state_dict(), out)


if __name__ == "__main__":
    main()
