"""Which rank each layer gets: what a rank costs, what it loses, and how a budget is shared out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressops.formats.decompose import Spectrum, unfolded
from compressops.formats.lowrank import LowRank

# Shares of the channels that Tucker's two ranks are tried at.
_SHARES = 64
# Kernels compute so many channels at once.
CHANNELS = 16


@dataclass(frozen=True)
class Point:
    """A layer at one rank.

    Attributes:
        layout: ``None``: the layer as it is.
        macs: multiply-accumulates for an output position.
        entries: of the weight or its factors.
        error: relative squared error of the weight, or of the layer's outputs where the spectrum
            is theirs; NaN where only decomposing would tell.
    """

    layout: LowRank | None
    macs: int
    entries: int
    error: float


def points(
    form: str,
    weight: Tensor,
    stride: tuple[int, int],
    spectrum: Spectrum | None = None,
    multiple: int = CHANNELS,
) -> list[Point]:
    """The ranks of a form that make a layer smaller and cheaper than it is, lowest first.

    Args:
        spectrum: see `decompose`; ``None``: of the weight.
        multiple: of which ranks from there on are multiples: others take as long as the next one.
    """
    shape, dense = tuple(weight.shape), weight.numel()
    found = []
    for rank, error in _errors(form, weight, spectrum, multiple):
        layout = LowRank(rank, form)
        macs, entries = layout.macs(shape, stride), layout.entries(shape)
        if max(macs, entries) < dense:
            found.append(Point(layout, macs, entries, error))
    return found


def _errors(
    form: str, weight: Tensor, spectrum: Spectrum | None, multiple: int
) -> Iterator[tuple[int | tuple[int, int], float]]:
    """Every rank that is tried, with its error."""
    if not weight.numel():
        return
    largest = LowRank.largest(form, tuple(weight.shape))
    if form == "cp":
        yield from ((rank, math.nan) for rank in _steps(largest, multiple))
    elif form == "tucker":
        modes = [Spectrum.of(weight.detach().transpose(0, mode).flatten(1)) for mode in (0, 1)]
        tails = [_padded(mode.errors(), size) for mode, size in zip(modes, largest, strict=True)]
        pairs = {
            tuple(
                min(size, _step(math.ceil(size * share / _SHARES), multiple)) for size in largest
            ): None
            for share in range(1, _SHARES + 1)
        }
        for pair in pairs:
            # The bound of De Lathauwer et al. 2000, property 10; the error lies little below.
            error = sum(tail[rank].item() for tail, rank in zip(tails, pair, strict=True))
            yield pair, min(1.0, error)
    else:
        spectrum = spectrum or Spectrum.of(unfolded(form, weight))
        errors = _padded(spectrum.errors(), largest)
        yield from ((rank, errors[rank].item()) for rank in _steps(largest, multiple))


def _padded(errors: Tensor, largest: int) -> Tensor:
    """Errors of ranks 0 to ``largest``: 0 from where the matrix is exact."""
    return torch.cat([errors, errors.new_zeros(max(0, largest + 1 - len(errors)))])


def _steps(largest: int, multiple: int) -> list[int]:
    return [rank for rank in range(1, largest + 1) if rank == _step(rank, multiple)]


def _step(rank: int, multiple: int) -> int:
    """The least rank of this at least that is tried."""
    return rank if rank < multiple else math.ceil(rank / multiple) * multiple


def hull(found: Sequence[Point], cost: str) -> list[Point]:
    """The points from which no mixture of two others is better, dearest first: each step to the
    next costs more error for what it saves than the one before.

    Args:
        found: with one whose ``layout`` is ``None``.
        cost: ``"macs"`` or ``"entries"``.
    """
    ordered = sorted(found, key=lambda p: (-getattr(p, cost), p.error))
    kept: list[Point] = []
    for point in ordered:
        while kept and (
            point.error <= kept[-1].error
            or (len(kept) > 1 and _slope(kept[-1], point, cost) <= _slope(*kept[-2:], cost))
        ):
            kept.pop()
        kept.append(point)
    return kept


def _slope(dear: Point, cheap: Point, cost: str) -> float:
    saved = getattr(dear, cost) - getattr(cheap, cost)
    return (cheap.error - dear.error) / saved if saved else math.inf


@dataclass(frozen=True)
class Options:
    """What one layer may become.

    Attributes:
        points: the layer as it is, and at each rank.
        positions: output positions of a sample, or rows of a linear layer's.
        sensitivity: error of the model's output for the layer's error, both relative and squared.
    """

    points: Sequence[Point]
    positions: float = 1.0
    sensitivity: float = 1.0

    @property
    def dense(self) -> Point:
        return next(point for point in self.points if point.layout is None)


def allocate(layers: Mapping[str, Options], cost: str, part: float) -> dict[str, Point]:
    """Share a budget out: the steps that lose least for what they save are taken first, until all
    layers together cost at most ``part`` of what they do.

    As each layer's steps lose more and more, no other choice of these ranks has a smaller sum of
    errors at that cost, up to the last step.

    Raises:
        ValueError: the budget is below what the lowest ranks take.
    """
    scale = {n: options.positions if cost == "macs" else 1.0 for n, options in layers.items()}
    hulls = {name: hull(options.points, cost) for name, options in layers.items()}
    chosen = dict.fromkeys(layers, 0)
    spent = {n: getattr(options.dense, cost) * scale[n] for n, options in layers.items()}
    budget = part * sum(spent.values())
    steps = sorted(
        (
            layers[name].sensitivity * _slope(dear, cheap, cost) / scale[name],
            index,
            name,
        )
        for name, found in hulls.items()
        for index, (dear, cheap) in enumerate(itertools.pairwise(found), 1)
    )
    for _, index, name in steps:
        if sum(spent.values()) <= budget:
            break
        chosen[name] = index
        spent[name] = getattr(hulls[name][index], cost) * scale[name]
    if sum(spent.values()) > budget:
        least = sum(spent.values()) / budget * part
        raise ValueError(f"{part} of the {cost} is less than the lowest ranks take: {least:.4f}")
    return {name: hulls[name][index] for name, index in chosen.items()}
