"""A teacher's logits of a whole data set, computed once and kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressops.compress.identity import data_key, hash_json, model_key
from compressops.distill.capture import logits_of
from compressops.measure import evaluating
from compressops.train import checkpoint as checkpoints
from compressops.train import data
from compressops.train.rng import seeded


def cached_logits(
    teacher: nn.Module,
    dataset: Any,
    folder: str | Path | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Tensor:
    """What ``teacher`` says of every sample of ``dataset``: float32 ``[N, classes]`` on the CPU.

    With them `Distiller` runs no teacher: ``kd(output, teacher_output=logits[indices])``; and
    `Retrain` none with ``cache_teacher=True``. That is for losses on logits alone.

    Args:
        teacher: runs in eval mode, without gradients, and is left in the mode that it was in.
        dataset: map-style, of ``(inputs, labels)``, and the same whenever it is read.
        folder: where to keep them, in a file that is named by a hash of the teacher and of the data
            (as `compress` tells data sets from others); ``None`` keeps nothing.
        device: where the teacher is to run; ``None`` is where it is.

    Raises:
        ValueError: the data change from epoch to epoch, or a file is damaged.
    """
    check_constant("cached_logits", dataset)
    path = None
    if folder is not None:
        path = Path(folder) / f"logits-{hash_json([model_key(teacher), data_key(dataset)[0]])}.pt"
        if path.exists():
            return checkpoints.load(path)["logits"]
    device = device or next((p.device for p in teacher.parameters()), torch.device("cpu"))
    teacher.to(device)
    found = []
    with evaluating(teacher):
        for batch in data.loader(dataset, data.shards(len(dataset), batch_size, 0, 1)):
            args, kwargs, _ = data.split_batch(data.to_device(batch, device))
            found.append(logits_of(teacher(*args, **kwargs)).float().cpu())
    logits = torch.cat(found)
    if path is not None:
        checkpoints.save(path, {"logits": logits})
    return logits


def check_constant(owner: str, dataset: Any) -> None:
    """Refuse data that a second epoch would see otherwise.

    Raises:
        ValueError: it has ``set_epoch``, or its first item is a matter of chance.
    """
    data.check_dataset("dataset", dataset)
    name = type(dataset).__name__
    if hasattr(dataset, "set_epoch"):
        raise ValueError(f"{owner}: {name} has set_epoch: its samples change with the epoch")
    items = []
    for seed in (1, 2):
        with seeded(seed):
            batch = next(iter(data.loader(dataset, [[0]], seeds=[seed])))
            args, kwargs, _ = data.split_batch(batch)
            items.append([*args, *kwargs.values()])
    for first, second in zip(*items, strict=True):
        if isinstance(first, Tensor) and not torch.equal(first, second):
            raise ValueError(f"{owner}: {name} draws random numbers: its samples change")
