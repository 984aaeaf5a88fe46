"""Compresses a tiny network on made-up data; a process of its own, so that it can be killed.

accelerate launch --config_file recipes/accelerate/KIND.yaml tests/retrain_worker.py KIND OUT
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from compressops.compress import Encode, Prune, Quantize, Recipe, Result, Retrain, compress
from compressops.compress.quantize import Refit
from compressops.distill import ActivationKD, AttentionMapKD, LogitsKD
from compressops.formats import DynamicFixedPoint, Huffman, Int
from compressops.train import sharding

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


def _training(**options: Any) -> Retrain:
    losses = LogitsKD(2.0), ActivationKD(("1", "3")), AttentionMapKD("1")
    return Retrain(batch_size=24, accumulate=2, distill=losses, checkpoint_seconds=0.0, **options)


def ddp_recipe() -> Recipe:
    """Much that only DDP serves."""
    return Recipe(
        [
            Prune(0.4, scope="global", schedule="cubic", updates=5),
            _training(epochs=2, lr=0.05, clip_grad_norm=0.1),
            Quantize(Int(6), activations=Int(8)),
            _training(steps=5, lr=0.01, optimizer="muon"),
        ]
    )


def fsdp_recipe() -> Recipe:
    return Recipe(
        [
            Prune(0.4, scope="global"),
            _training(epochs=1.5, lr=0.05, clip_grad_norm=0.1),
            Quantize(DynamicFixedPoint(6)),
            _training(steps=5, lr=0.002, optimizer="adamw", weight_decay=0.01),
        ]
    )


def compress_images(recipe: Recipe, workdir: str | None = None) -> Result:
    data = Points(96, (2, 6, 6)), Points(61, (2, 6, 6))
    return compress(images_network(), recipe, *data, images_network(12), workdir, log=False)


class _Watch:
    """Sees each `Retrain` begin, and kills the process after a step of the last."""

    def __init__(self, kill: bool) -> None:
        self.kill = kill
        self.sharded: list[bool] = []
        self.first_steps: list[int] = []
        self.begin, self.update = Refit.begin, Refit.update
        Refit.begin = lambda refit, *arguments: self.began(refit, *arguments)
        Refit.update = lambda refit, *arguments: self.updated(refit, *arguments)

    def began(self, refit: Refit, model: nn.Module, step: int, *others: Any) -> None:
        self.first_steps.append(step)
        self.sharded.append(all(isinstance(p, DTensor) for p in model.parameters()))
        self.begin(refit, model, step, *others)

    def updated(self, refit: Refit, model: nn.Module, step: int, *others: Any) -> None:
        if self.kill and len(self.sharded) == 2 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        self.update(refit, model, step, *others)


def share(kind: str, out: str, kill: bool = False) -> None:
    """A run of ``kind`` ("ddp" or "fsdp") in one of several processes; each writes what it has."""
    torch.set_num_threads(1)
    recipe = {"ddp": ddp_recipe, "fsdp": fsdp_recipe}[kind]()
    watch = _Watch(kill)
    result = compress_images(recipe, out)
    state = {
        "model": result.model.state_dict(),
        "rows": [(row.top1, row.top5) for row in result.table],
        "history": result.history,
        "first_steps": watch.first_steps,
        "sharded": watch.sharded,
        "world": PartialState().num_processes,
    }
    torch.save(state, f"{out}.{os.environ['RANK']}")


def share_alone(kind: str, out: str, rank: int, port: int, kill: bool) -> None:
    """`share` in a process that no launcher has told of the others."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        sharding.FSDP_VARIABLE: str(kind == "fsdp"),
    }
    share(kind, out, kill)


if __name__ == "__main__":
    share(*sys.argv[1:])
