"""Accuracy of a classifier on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrize

from compressops.distill.capture import logits_of
from compressops.train import data
from compressops.train.progress import Progress


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent over ``samples`` samples (top-k of k classes if fewer than 5)."""

    top1: float
    top5: float
    samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 500,
    accelerator: Any = None,
    console: Console | None = None,
    title: str = "evaluate",
) -> Accuracy:
    """Top-1 and top-5 accuracy of ``model`` on all of ``dataset``.

    Args:
        model: returns logits ``[N, classes]``; every module is put into eval mode and back.
        dataset: a map-style data set of ``(inputs, labels)``.
        accelerator: shares the work between its processes and gives the device; ``None`` works
            here, on the device of the model's first parameter.
    """
    data.check_dataset("eval_data", dataset)
    rank = accelerator.process_index if accelerator else 0
    world = accelerator.num_processes if accelerator else 1
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    batches = data.shards(len(dataset), batch_size, rank, world)
    hits = torch.zeros(2, dtype=torch.float64)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Compressed weights are computed from their parametrizations once, not once a batch.
        with (
            parametrize.cached(),
            Progress(console if rank == 0 else None, title, len(batches)) as bar,
        ):
            for batch in data.loader(dataset, batches):
                args, kwargs, labels = data.split_batch(data.to_device(batch, device))
                logits = logits_of(model(*args, **kwargs))
                ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
                hits[0] += ranked[:, 0].sum().item()
                hits[1] += ranked.any(1).sum().item()
                bar.advance()
    finally:
        # Each to its own: a frozen batch norm is in eval mode within a model that trains.
        for module, was in training:
            module.training = was
    if world > 1:
        # float32 holds whole numbers to 2**24 and is what every backend reduces.
        hits = accelerator.reduce(hits.float().to(accelerator.device), "sum").double().cpu()
    top1, top5 = (100 * hits / len(dataset)).tolist()
    return Accuracy(top1, top5, len(dataset))
