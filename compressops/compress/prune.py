"""Pruning by magnitude: which entries or blocks of the weights stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.compress import checks
from compressops.compress.parametrizations import Mask, find, input_of, register
from compressops.compress.select import select, tied_groups
from compressops.compress.stage import Controller, Stage


@dataclass(frozen=True)
class Prune(Stage):
    """Zero the weights of least magnitude, keeping exactly ``density`` of those selected.

    What an earlier stage pruned stays pruned (only ``"surgery"`` lets it come back): where less
    than ``density`` is alive, all of that is kept and no more.

    Args:
        density: part of the entries (or blocks) that stays, in (0, 1]; over all selected layers
            together it is met to the entry.
        granularity: ``"element"``, or ``"block"``: tiles of ``weight.flatten(1)``, ranked by the
            root mean square of their entries; tiles at the ragged edges count as tiles.
        block: ``(rows, columns)`` of a tile.
        scope: ``"layer"`` gives every layer the same density; ``"global"`` ranks all selected
            layers together.
        score: what a global ranking compares. ``"magnitude"``: the absolute value, which asks for
            layers of one scale. ``"lamp"``: w² over the sum of the squares of the layer's entries
            that are not smaller (Lee et al. 2021, arXiv 2010.07611, eq. 3), which no layer's scale
            changes. Within a layer the order is the same.
        schedule: ``"one_shot"``; ``"cubic"`` (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1) raises
            the sparsity during the following `Retrain`, from what it is; ``"surgery"`` (Guo et
            al. 2016, arXiv 1608.04493, eq. 3) prunes at once and then lets entries come back: one
            below (1 − ``hysteresis``) × the threshold of ``density`` is pruned, one above
            (1 + ``hysteresis``) × is restored, one between stays as it is; pruned entries are
            trained on (eq. 4).
        updates: how often a schedule changes the masks.
        ends: the part of the following `Retrain` after which the masks are final, and exact.
        hysteresis: of ``"surgery"``; half the distance of its two thresholds.
        layers, exclude: globs over the names of the layers.
    """

    density: float
    granularity: str = "element"
    block: tuple[int, int] = (16, 16)
    scope: str = "layer"
    score: str = "magnitude"
    schedule: str = "one_shot"
    updates: int = 30
    ends: float = 0.7
    hysteresis: float = 0.1
    layers: str | tuple[str, ...] = "*"
    exclude: str | tuple[str, ...] = ()

    main_field: ClassVar[str | None] = "density"

    def __post_init__(self) -> None:
        checks.number("density", self.density, 0, 1, open_low=True)
        checks.choice("granularity", self.granularity, ("element", "block"))
        checks.choice("scope", self.scope, ("layer", "global"))
        checks.choice("score", self.score, ("magnitude", "lamp"))
        checks.choice("schedule", self.schedule, ("one_shot", "cubic", "surgery"))
        checks.integer("updates", self.updates, 1)
        checks.number("ends", self.ends, 0, 1, open_low=True)
        checks.number("hysteresis", self.hysteresis, 0, 1, open_high=True)
        if not isinstance(self.block, (tuple, list)) or len(self.block) != 2:
            raise TypeError(f"block must be two integers, got {self.block!r}")
        for side in self.block:
            # The sides that `BlockSparse` can store.
            checks.integer("block", side, 1, 1024)
        object.__setattr__(self, "block", tuple(self.block))
        object.__setattr__(self, "layers", checks.globs("layers", self.layers))
        object.__setattr__(self, "exclude", checks.globs("exclude", self.exclude))

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        for name, module in select(model, self.layers, self.exclude).items():
            mask = find(module, Mask)
            if mask is not None and mask.block != self._block:
                raise ValueError(
                    f"layer {name!r} is already pruned in blocks of {mask.block or 'one entry'}, "
                    f"not {self._block or 'one entry'}"
                )
        if self.schedule != "one_shot" and not (later and type(later[0]).__name__ == "Retrain"):
            raise ValueError(
                f"schedule={self.schedule!r} acts during the next stage, which must be Retrain, "
                f"not {type(later[0]).__name__ if later else 'the end of the recipe'}"
            )

    def attach(self, model: nn.Module) -> None:
        for group in tied_groups(select(model, self.layers, self.exclude)):
            if find(group[0], Mask) is None:
                keep = torch.ones_like(group[0].weight, dtype=torch.bool)
                mask = Mask(keep, self._block)
                # One for all that share the weight, so that they cannot part.
                for module in group:
                    register(module, mask)
        layers = self.weights(model)
        if self.schedule != "cubic":
            self.prune(layers, self.density)
        else:
            for module in layers:
                mask = find(module, Mask)
                mask.start = (self._units(mask.mask.float()) > 0).float().mean().item()

    def weights(self, model: nn.Module) -> list[nn.Module]:
        """The selected layers, one of those that share a weight."""
        return [group[0] for group in tied_groups(select(model, self.layers, self.exclude))]

    def controller(self) -> Controller | None:
        return None if self.schedule == "one_shot" else _Schedule(self)

    @property
    def lossless(self) -> bool:
        """The cubic schedule begins with the masks as they are."""
        return self.schedule == "cubic"

    @property
    def _block(self) -> tuple[int, int] | None:
        return self.block if self.granularity == "block" else None

    @torch.no_grad()
    def prune(
        self,
        layers: list[nn.Module],
        density: float | list[float],
        recover: bool = False,
    ) -> None:
        """Set the masks so that the best ``density`` of the units stays (one for each layer where
        it is a list).

        Entries that are pruned already stay so, unless they may ``recover``.
        """
        masks = [find(module, Mask) for module in layers]
        scores, living = [], []
        for module, mask in zip(layers, masks, strict=True):
            magnitude = self._units(input_of(module, mask))
            alive = torch.ones_like(magnitude, dtype=torch.bool)
            if not recover:
                alive = self._units(mask.mask.float()) > 0
                # Entries that are alive with magnitude 0 still come before the pruned ones.
                magnitude = torch.where(alive, magnitude, -1.0)
            scores.append(magnitude)
            living.append(alive)
        for mask, keep, alive in zip(masks, self._best(scores, density), living, strict=True):
            mask.mask.copy_(self._entries(keep & alive, mask.mask))

    def cubic(self, layers: list[nn.Module], done: float) -> float | list[float]:
        """The densities when the part ``done`` of the schedule is over (Zhu & Gupta, eq. 1, with
        the sparsity that each layer began with as s_i)."""

        def at(start: float) -> float:
            return self.density + max(0.0, start - self.density) * (1 - done) ** 3

        masks = [find(module, Mask) for module in layers]
        if self.scope == "layer":
            return [at(mask.start) for mask in masks]
        counts = [self._units(mask.mask.float()).numel() for mask in masks]
        alive = sum(mask.start * count for mask, count in zip(masks, counts, strict=True))
        return at(alive / max(1, sum(counts)))

    @torch.no_grad()
    def operate(self, layers: list[nn.Module]) -> None:
        """One update of dynamic network surgery."""
        masks = [find(module, Mask) for module in layers]
        scores = [
            self._units(input_of(module, mask)) for module, mask in zip(layers, masks, strict=True)
        ]
        kept = self._best(scores, self.density)
        for mask, score, best in zip(masks, scores, kept, strict=True):
            # The threshold of eq. 3: what separates the layer's entries at the asked density.
            if best.all():
                threshold = score.new_zeros(())
            elif not best.any():
                threshold = score.max()
            else:
                threshold = (score[best].min() + score[~best].max()) / 2
            old = self._units(mask.mask.to(score.dtype)) > 0
            new = (old & (score >= threshold * (1 - self.hysteresis))) | (
                score > threshold * (1 + self.hysteresis)
            )
            mask.mask.copy_(self._entries(new, mask.mask))

    def _best(self, scores: list[Tensor], density: float | list[float]) -> list[Tensor]:
        if self.scope == "layer":
            each = density if isinstance(density, list) else [density] * len(scores)
            return [_top(score, d) for score, d in zip(scores, each, strict=True)]
        ranked = [_lamp(score) for score in scores] if self.score == "lamp" else scores
        kept = _top(torch.cat([score.flatten() for score in ranked]), density)
        parts = kept.split([score.numel() for score in scores])
        return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]

    def _units(self, weight: Tensor) -> Tensor:
        """Magnitudes of the entries, or the RMS of the blocks ``[rows, columns]``, in float32."""
        weight = weight.float().abs()
        if self._block is None:
            return weight
        rows, columns = self.block
        matrix = weight.flatten(1).square()
        pad = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
        sums = F.avg_pool2d(F.pad(matrix, pad)[None], self.block, divisor_override=1)[0]
        sizes = F.avg_pool2d(
            F.pad(torch.ones_like(matrix), pad)[None], self.block, divisor_override=1
        )[0]
        return (sums / sizes).sqrt()

    def _entries(self, units: Tensor, like: Tensor) -> Tensor:
        """The mask of the entries, from that of the units."""
        if self._block is None:
            return units
        rows, columns = self.block
        matrix = units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        height = len(like)
        return matrix[:height, : like.numel() // max(1, height)].reshape(like.shape)


class _Schedule:
    """Moves the masks of a `Prune` during a `Retrain`."""

    def __init__(self, stage: Prune) -> None:
        self.stage = stage

    def begin(
        self,
        model: nn.Module,
        step: int,
        total_steps: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.layers = self.stage.weights(model)
        recover = self.stage.schedule == "surgery" and step < self._last(total_steps)
        for module in self.layers:
            find(module, Mask).recover = recover

    def _last(self, total_steps: int) -> int:
        return max(1, round(total_steps * self.stage.ends))

    def update(self, model: nn.Module, step: int, total_steps: int, epoch_ends: bool) -> None:
        last = self._last(total_steps)
        every = max(1, last // self.stage.updates)
        if step > last or (step % every and step != last):
            return
        if step == last:
            self.stage.prune(
                self.layers, self.stage.density, recover=self.stage.schedule == "surgery"
            )
            self._stop_recovery()
        elif self.stage.schedule == "surgery":
            self.stage.operate(self.layers)
        else:
            self.stage.prune(self.layers, self.stage.cubic(self.layers, step / last))

    def _stop_recovery(self) -> None:
        for module in self.layers:
            find(module, Mask).recover = False


def _top(score: Tensor, density: float) -> Tensor:
    """Marks exactly round(density · n) entries, at least one, of highest score."""
    flat = score.flatten()
    if not flat.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    count = max(1, round(density * flat.numel()))
    keep = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    # A stable sort, so that ties fall alike on every machine and in every process.
    keep[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    return keep.view(score.shape)


def _lamp(score: Tensor) -> Tensor:
    flat = score.flatten().double()
    order = torch.argsort(flat, descending=True, stable=True)
    squares = flat[order].clamp(min=0).square()
    ranked = torch.empty_like(flat)
    # Pruned entries carry −1 and stay below every other.
    ranked[order] = torch.where(
        flat[order] < 0, -1.0, squares / squares.cumsum(0).clamp(min=math.ulp(0.0))
    )
    return ranked.view(score.shape)
