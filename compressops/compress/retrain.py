"""The recipe's retraining stage: what to train with. The loop itself is in `compressops.train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compressops.compress import checks
from compressops.compress.stage import Stage
from compressops.distill.losses import DistillLoss, LogitsKD


@dataclass(frozen=True)
class Retrain(Stage):
    """Train the compressed model, with what was done to its weights held.

    Exactly one of ``epochs`` and ``steps`` is given.

    Args:
        epochs: passes over the training data; a fraction is allowed.
        steps: optimizer steps.
        optimizer: ``"sgd"`` (Nesterov), ``"adamw"``, or ``"muon"`` (Jordan 2024): Muon for the
            weights of two and more dimensions, seen as ``[out, in·kh·kw]`` matrices, except the
            last layer's; SGD for that and all else.
        lr: peak learning rate. Muon's is relative to the norm of each matrix: 0.1 trains from
            scratch, 0.01 to 0.05 retrains.
        other_lr: of what Muon leaves to SGD; ``None`` is ``lr``.
        momentum: of SGD and Muon.
        weight_decay: of the weights of two and more dimensions; others have none.
        batch_size: samples of one optimizer step, over all processes and accumulated parts.
        accumulate: parts that each process does its share of a batch in.
        schedule: ``"cosine"``, ``"linear"`` or ``"constant"``, from ``lr`` down to 0.
        warmup: part of all steps in which the rate rises from 0.
        label_smoothing: of the cross entropy.
        ce_weight: weight of the cross entropy with the labels.
        distill: losses against the teacher; total = ce_weight · CE + Σ weight · loss.
        cache_teacher: run the teacher once over the training data, and keep its logits in the work
            folder. For losses on logits alone, and data that are the same in every epoch.
        clip_grad_norm: the gradients' largest norm, or ``None``.
        ema: decay of a running mean of the trained tensors that replaces them in the end, 0 is off.
        image_sizes: ``(size, part of the steps)`` pairs: train on images of other sizes, smaller
            ones first to save time. Parts add up to 1. The data set must have ``set_size`` and the
            attribute ``size``; it gets back the size that it had.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; ``None`` leaves it to the launcher.
        convolutions: ``"winograd"`` runs 3×3 convolutions as F(4×4, 3×3) while training on a CPU in
            float32, the teacher's too: less time, other rounding
            (`compressops.train.convolutions`). ``"direct"`` leaves them.
        blocks: ``"sparse"`` runs linear layers that are pruned in blocks on the blocks that are
            left, forward and backward, while training on a CPU: less time, sums in another order
            (`compressops.train.blocks`). While a schedule moves masks, those of the moment count;
            layers that still keep more than two fifths of their blocks, or let some come back, run
            densely. ``"dense"`` multiplies all weights under their masks, as convolutions do.
        checkpoint_seconds: time between checkpoints within an epoch; each epoch makes one too.
        workers: processes that load data; 0 loads in the training process.
    """

    epochs: float | None = None
    steps: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.01
    other_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 128
    accumulate: int = 1
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    ce_weight: float = 1.0
    distill: tuple[DistillLoss, ...] = ()
    cache_teacher: bool = False
    clip_grad_norm: float | None = None
    ema: float = 0.0
    image_sizes: tuple[tuple[int, float], ...] = ()
    mixed_precision: str | None = None
    convolutions: str = "direct"
    blocks: str = "dense"
    checkpoint_seconds: float = 60.0
    workers: int = 0

    main_field: ClassVar[str | None] = "epochs"

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"give epochs or steps, not both: got epochs={self.epochs}, steps={self.steps}"
            )
        if self.epochs is not None:
            checks.number("epochs", self.epochs, 0, open_low=True)
        else:
            checks.integer("steps", self.steps, 1)
        checks.choice("optimizer", self.optimizer, ("sgd", "adamw", "muon"))
        checks.number("lr", self.lr, 0, open_low=True)
        if self.other_lr is not None:
            checks.number("other_lr", self.other_lr, 0, open_low=True)
            if self.optimizer != "muon":
                raise ValueError(f"other_lr goes with optimizer='muon', not {self.optimizer!r}")
        checks.number("momentum", self.momentum, 0, 1, open_high=True)
        checks.number("weight_decay", self.weight_decay, 0)
        checks.integer("batch_size", self.batch_size, 1)
        checks.integer("accumulate", self.accumulate, 1)
        checks.choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        checks.number("warmup", self.warmup, 0, 1)
        checks.number("label_smoothing", self.label_smoothing, 0, 1)
        checks.number("ce_weight", self.ce_weight, 0)
        if self.clip_grad_norm is not None:
            checks.number("clip_grad_norm", self.clip_grad_norm, 0, open_low=True)
        checks.number("ema", self.ema, 0, 1, open_high=True)
        checks.choice("mixed_precision", self.mixed_precision, (None, "no", "bf16", "fp16"))
        checks.choice("convolutions", self.convolutions, ("direct", "winograd"))
        checks.choice("blocks", self.blocks, ("dense", "sparse"))
        checks.number("checkpoint_seconds", self.checkpoint_seconds, 0)
        checks.integer("workers", self.workers)
        losses = (self.distill,) if isinstance(self.distill, DistillLoss) else self.distill
        if not isinstance(losses, (tuple, list)) or not all(
            isinstance(loss, DistillLoss) for loss in losses
        ):
            known = ", ".join(sorted(DistillLoss.members))
            raise TypeError(f"distill must be a list of losses ({known}), got {self.distill!r}")
        object.__setattr__(self, "distill", tuple(losses))
        checks.flag("cache_teacher", self.cache_teacher)
        if self.cache_teacher and not (losses and all(type(x) is LogitsKD for x in losses)):
            raise ValueError(f"cache_teacher=True serves losses on logits alone, got {losses}")
        if self.cache_teacher and self.image_sizes:
            raise ValueError(f"cache_teacher=True needs images of one size, got {self.image_sizes}")
        if not self.ce_weight and not losses:
            raise ValueError("ce_weight=0 without distill leaves nothing to train on")
        self._check_sizes()

    def _check_sizes(self) -> None:
        try:
            sizes = tuple((size, part) for size, part in self.image_sizes)
        except (TypeError, ValueError):
            raise TypeError(
                f"image_sizes must be a list of [size, part] pairs, got {self.image_sizes!r}"
            ) from None
        for size, part in sizes:
            checks.integer("image_sizes: size", size, 1)
            checks.number("image_sizes: part", part, 0, 1, open_low=True)
        if sizes and abs(sum(part for _, part in sizes) - 1) > 1e-6:
            raise ValueError(f"the parts of image_sizes must add up to 1, got {sizes}")
        object.__setattr__(self, "image_sizes", sizes)

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("the model has no trainable parameter")

    @property
    def label(self) -> str:
        length = f"{self.epochs} epochs" if self.steps is None else f"{self.steps} steps"
        return f"Retrain {length}"
