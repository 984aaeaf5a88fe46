"""Which samples each optimizer step takes: a function of seed, epoch and step alone.

A run that resumes, or that runs on another number of processes, sees the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from compressops.train.rng import seeded

_SORTED_BATCHES = 50


@dataclass(frozen=True)
class Plan:
    """The steps of a training run.

    Args:
        samples: size of the data set.
        batch_size: samples of a step, over all processes; what is left of an epoch is dropped.
        total_steps: length of the run.
        image_sizes: ``(size, part of the steps)`` in order, or empty.
        seed: of the order of the samples.
        lengths: of the samples, where batches are to hold samples of like length.
    """

    samples: int
    batch_size: int
    total_steps: int
    image_sizes: tuple[tuple[int, float], ...]
    seed: int
    lengths: torch.Tensor | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    def size_at(self, step: int) -> int | None:
        """The image size that ``step`` trains on."""
        done = 0.0
        for size, part in self.image_sizes:
            done += part
            if step < round(done * self.total_steps):
                return size
        return self.image_sizes[-1][0] if self.image_sizes else None

    def segments(self, start: int) -> Iterator[tuple[int, int | None, int, int]]:
        """``(epoch, image size, first step, end)`` of the runs of steps that share the first two,
        from step ``start`` on."""
        step = start
        while step < self.total_steps:
            epoch, size = step // self.steps_per_epoch, self.size_at(step)
            end = step + 1
            limit = min(self.total_steps, (epoch + 1) * self.steps_per_epoch)
            while end < limit and self.size_at(end) == size:
                end += 1
            yield epoch, size, step, end
            step = end

    def batches(
        self, epoch: int, first: int, end: int, rank: int, world: int, accumulate: int
    ) -> list[list[int]]:
        """The indices of the parts that process ``rank`` of ``world`` loads for steps
        ``[first, end)`` of ``epoch``: ``accumulate`` parts to a step."""
        order = self._order(epoch)
        share = self.batch_size // world
        parts = []
        for step in range(first, end):
            at = (step - epoch * self.steps_per_epoch) * self.batch_size + rank * share
            mine = order[at : at + share]
            parts += [part.tolist() for part in mine.tensor_split(accumulate)]
        return parts

    def _order(self, epoch: int) -> torch.Tensor:
        """The samples of an epoch. With ``lengths`` each run of `_SORTED_BATCHES` batches is sorted
        by them before the batches are shuffled, so that little is padded and chance remains."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(self.samples, generator=generator)
        if self.lengths is None:
            return order
        used = order[: self.steps_per_epoch * self.batch_size]
        runs = used.split(_SORTED_BATCHES * self.batch_size)
        batches = torch.cat([run[self.lengths[run].argsort(stable=True)] for run in runs])
        batches = batches.view(-1, self.batch_size)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()

    def seeds(self, epoch: int, first: int, end: int, rank: int, accumulate: int) -> list[int]:
        """The seed of each of the parts that `batches` gives."""
        steps = range(first, end)
        return [mix(self.seed, epoch, s, rank, part) for s in steps for part in range(accumulate)]


def plan(
    dataset: Any,
    *,
    epochs: float | None,
    steps: int | None,
    batch_size: int,
    image_sizes: tuple[tuple[int, float], ...],
    world: int,
    accumulate: int,
    seed: int,
) -> Plan:
    """Check that the data set serves, and lay out the steps.

    A data set with an attribute ``lengths``, one number a sample, gets samples of like length in a
    batch.

    Raises:
        TypeError: ``dataset`` has no length or items, or where sizes are asked for no ``set_size``
            and ``size``.
        ValueError: a batch does not fit the data set or the processes, or there are not as many
            lengths as samples.
    """
    check_dataset("train_data", dataset)
    samples = len(dataset)
    if batch_size > samples:
        raise ValueError(f"batch_size={batch_size} is more than the {samples} training samples")
    if batch_size % world:
        raise ValueError(f"batch_size={batch_size} is not a multiple of the {world} processes")
    if accumulate > batch_size // world:
        raise ValueError(
            f"accumulate={accumulate} is more than the {batch_size // world} samples that each of "
            f"{world} processes has of a batch"
        )
    if image_sizes and not hasattr(dataset, "set_size"):
        raise TypeError(f"image_sizes: {type(dataset).__name__} has no set_size()")
    if image_sizes and not hasattr(dataset, "size"):
        raise TypeError(
            f"image_sizes: {type(dataset).__name__} has no attribute size, the size to go back to"
        )
    total = steps if steps is not None else max(1, round(epochs * (samples // batch_size)))
    lengths = getattr(dataset, "lengths", None)
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
        if lengths.shape != (samples,):
            raise ValueError(
                f"lengths of {type(dataset).__name__}: {list(lengths.shape)} for {samples} samples"
            )
    return Plan(samples, batch_size, total, image_sizes, seed, lengths)


def check_dataset(name: str, dataset: Any) -> None:
    if not hasattr(dataset, "__len__") or not (
        hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")
    ):
        raise TypeError(
            f"{name} must be a map-style data set (__len__ and __getitem__), got {type(dataset)}"
        )
    if not len(dataset):
        raise ValueError(f"{name} is empty")


class _Batch(list):
    """The indices of a batch, and what its random numbers are seeded with."""

    seed = 0


class _Seeded:
    """Reads each batch with the random generators seeded for it, in whichever process.

    The seeds that torch gives its workers would be the same in every epoch, and after a resume.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: _Batch) -> Any:
        with seeded(batch.seed):
            if getattr(self.dataset, "__getitems__", None):
                return self.dataset.__getitems__(list(batch))
            return [self.dataset[index] for index in batch]


def loader(
    dataset: Any,
    batches: Sequence[list[int]],
    workers: int = 0,
    seeds: Sequence[int] | None = None,
) -> DataLoader:
    """Loads the given batches. A data set's ``__getitems__`` may return a whole batch at once.

    Args:
        seeds: of the random numbers (torch, numpy, ``random``) that the data set draws for each
            batch; ``None`` makes them a function of its first index.
    """
    sampler = []
    for i, indices in enumerate(batches):
        batch = _Batch(indices)
        batch.seed = mix(0, *indices[:1]) if seeds is None else seeds[i]
        sampler.append(batch)
    return DataLoader(
        _Seeded(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        # Otherwise an iterator draws from the global generator, once more after each resume.
        generator=torch.Generator().manual_seed(0),
    )


def _collate(items: Any) -> Any:
    return default_collate(items) if isinstance(items, list) else items


def split_batch(batch: Any) -> tuple[tuple, dict, torch.Tensor]:
    """``(positional inputs, keyword inputs, labels)`` of a batch.

    ``(x, y)`` with ``x`` a tensor, a tuple or a dict; or a dict with ``"labels"``.
    """
    if isinstance(batch, dict) and "labels" in batch:
        return (), {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        if isinstance(x, dict):
            return (), x, y
        return (tuple(x) if isinstance(x, (tuple, list)) else (x,)), {}, y
    raise TypeError(
        "a batch must be (inputs, labels) or a dict with 'labels', got "
        f"{sorted(batch) if isinstance(batch, dict) else type(batch).__name__}"
    )


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value


def mix(*numbers: int) -> int:
    """One seed out of several numbers (splitmix64), well spread even for small ones."""
    state = 0
    for value in numbers:
        state = (state ^ (value & _MASK)) * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state & (2**63 - 1)


_MASK = 2**64 - 1


def shards(samples: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """The batches of an evaluation that process ``rank`` of ``world`` does: all samples, in order,
    each in one process."""
    count = math.ceil(samples / batch_size)
    return [
        list(range(i * batch_size, min(samples, (i + 1) * batch_size)))
        for i in range(rank, count, world)
    ]
