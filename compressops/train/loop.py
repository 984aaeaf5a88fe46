"""The retraining loop, on Accelerate."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from compressops.distill.capture import logits_of
from compressops.distill.distiller import Distiller
from compressops.train import checkpoint as checkpoints
from compressops.train import data
from compressops.train.blocks import sparse_linears
from compressops.train.convolutions import winograd_convolutions
from compressops.train.optim import Ema, build_optimizer, learning_rate
from compressops.train.progress import Progress
from compressops.train.sharding import Replicated, Sharded, check_sharding, is_sharded
from compressops.train.tensorboard import Curves

if TYPE_CHECKING:
    from accelerate import Accelerator

    from compressops.compress.retrain import Retrain
    from compressops.compress.stage import Controller

# On a GPU, reading a loss waits for the device: look at several at once.
_LOSSES_BETWEEN_CHECKS = 25


def plan_of(options: Retrain, dataset: Any, accelerator: Accelerator, seed: int) -> data.Plan:
    """The steps that `train` takes; raises as `data.plan` and `check_sharding` do."""
    check_sharding(options, accelerator)
    return data.plan(
        dataset,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        image_sizes=options.image_sizes,
        world=accelerator.num_processes,
        accumulate=options.accumulate,
        seed=seed,
    )


def train(
    model: nn.Module,
    dataset: Any,
    options: Retrain,
    *,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    teacher_logits: Tensor | None = None,
    controllers: Sequence[Controller] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
    console: Console | None = None,
    title: str = "retrain",
    tensorboard: str | Path | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place.

    The order of the samples, their augmentation and the random numbers of dropout are functions
    of ``seed``, epoch and step (and process), so that a run that was killed and starts again from
    ``checkpoint`` goes on to the same bits, given the same machine and number of threads.

    Args:
        dataset: a map-style data set of ``(inputs, labels)``. Before each epoch its
            ``set_epoch(epoch, seed)`` is called, if it has one, and ``set_size`` as asked for;
            in the end its ``size`` is what it was. Random numbers that it draws from the global
            generators of torch, numpy and ``random`` are seeded for each batch, in the workers
            too.
        teacher: required by ``options.distill``; it is in eval mode meanwhile.
        teacher_logits: of every sample, ``[N, classes]``; the teacher does not run then.
        controllers: act on the model after each step.
        checkpoint: file to resume from if it is there, and to write to.
        tensorboard: folder for TensorBoard's event files: at each step every loss by name, as the
            main process sees it, and the learning rate.

    Returns:
        One entry per epoch: ``epoch``, ``loss``, ``lr``, ``seconds`` (since the start), and with
        ``options.distill`` ``cross_entropy`` and each loss by name, all without their weights.

    Raises:
        FloatingPointError: a loss is NaN or infinite; names the step.
        ImportError: ``tensorboard`` without the package of that name.
    """
    plan = plan_of(options, dataset, accelerator, seed)
    if options.distill and teacher is None:
        raise ValueError("distill needs a teacher")
    example = _example(dataset, options, seed)
    run = _Run(model, options, accelerator, teacher, plan, controllers, seed, checkpoint, example)
    run.teacher_logits = teacher_logits
    if tensorboard is not None and accelerator.is_main_process:
        run.curves = Curves(tensorboard, run.step)
    by_winograd = options.convolutions == "winograd"
    with (
        winograd_convolutions(run.model, teacher) if by_winograd else contextlib.nullcontext(),
        sparse_linears(run.model) if options.blocks == "sparse" else contextlib.nullcontext(),
        torch.random.fork_rng(),
        run.distiller or contextlib.nullcontext(),
        Progress(
            console if accelerator.is_main_process else None, title, plan.total_steps, run.step
        ) as bar,
    ):
        native = dataset.size if options.image_sizes else None
        try:
            run.all(dataset, bar)
        finally:
            # The next stage, and the caller, want the images as they were.
            if native is not None:
                dataset.set_size(native)
            if run.curves:
                run.curves.close()
    return run.history


def _example(dataset: Any, options: Retrain, seed: int) -> Any:
    """Two samples, where a loss has to learn the shapes of activations; ``None`` elsewhere."""
    if not any(loss.regressor for loss in options.distill):
        return None
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0, seed)
    return next(iter(data.loader(dataset, [list(range(min(2, len(dataset))))])))


class _Run:
    """State of one training run; ``step`` is the number of optimizer steps done."""

    teacher_logits: Tensor | None = None
    curves: Curves | None = None

    def __init__(
        self,
        model: nn.Module,
        options: Retrain,
        accelerator: Accelerator,
        teacher: nn.Module | None,
        plan: data.Plan,
        controllers: Sequence[Controller],
        seed: int,
        checkpoint: Path | None,
        example: Any,
    ) -> None:
        self.options, self.accelerator, self.plan, self.seed = options, accelerator, plan, seed
        self.held = (Sharded if is_sharded(accelerator) else Replicated)(model, accelerator)
        self.model = model = self.held.model
        self.distiller = None
        if options.distill:
            self.distiller = Distiller(model, teacher.to(accelerator.device), options.distill)
            if example is not None:
                args, kwargs, _ = data.split_batch(data.to_device(example, accelerator.device))
                self.distiller.fit_shapes(args, kwargs, seed)
                self.held.settle()
            self.held.others = self.distiller
        self.controllers, self.checkpoint = controllers, checkpoint
        self.trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            model,
            options.optimizer,
            lr=options.lr,
            other_lr=options.other_lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            extra=tuple(self.distiller.parameters()) if self.distiller else (),
        )
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.ema = Ema(self.trained, options.ema) if options.ema else None
        self.step, self.history, self.losses, self.seconds = 0, [], [], 0.0
        # Of each step in self.losses, the losses that it is the sum of.
        self.parts: list[list[float]] = []
        scaler = None
        self.unchecked: list[tuple[int, Tensor]] = []
        if checkpoint is not None and accelerator.is_main_process:
            checkpoints.remove_stale(checkpoint)
        if checkpoint is not None and checkpoint.exists():
            state = checkpoints.load(checkpoint)
            written = "under" if state.get("sharded") else "without"
            if bool(state.get("sharded")) != is_sharded(accelerator):
                # Each names the optimizer's tensors in its own way.
                raise ValueError(
                    f"checkpoint {checkpoint} was written {written} FSDP; go on so, or remove it "
                    "to start its stage anew"
                )
            self.held.load(state["model"])
            self.held.load_optimizer(optimizer, state["optimizer"])
            if self.ema:
                torch._foreach_copy_(self.ema.means, state["ema"])
            scaler = state["scaler"]
            self.step, self.history = state["step"], state["history"]
            self.losses, self.seconds = state["losses"], state["seconds"]
            self.parts = state.get("parts", [])
            if self.distiller:
                self.distiller.load_state_dict(state.get("regressors", {}))
        self.optimizer = self.held.prepare(optimizer)
        if scaler is not None:
            accelerator.scaler.load_state_dict(scaler)
        self.resumed = self.saved = time.monotonic()

    def all(self, dataset: Any, bar: Progress) -> None:
        options, accelerator, plan = self.options, self.accelerator, self.plan
        for controller in self.controllers:
            controller.begin(self.model, self.step, plan.total_steps, self.optimizer)
        self.model.train()
        for epoch, size, first, end in plan.segments(self.step):
            if size is not None:
                dataset.set_size(size)
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch, self.seed)
            rank, world = accelerator.process_index, accelerator.num_processes
            parts = plan.batches(epoch, first, end, rank, world, options.accumulate)
            seeds = plan.seeds(epoch, first, end, rank, options.accumulate)
            loader = data.loader(dataset, parts, options.workers, seeds)
            batches = zip(parts, loader, strict=True)
            for _ in range(first, end):
                self.one(batches)
                bar.advance(self.note())
        self.model.eval()
        self.model = self.held.finish()

    def one(self, batches: Any) -> None:
        """One optimizer step."""
        options, plan = self.options, self.plan
        torch.manual_seed(data.mix(self.seed, self.step, self.accelerator.process_index))
        factor = self.factor(self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        share = plan.batch_size // self.accelerator.num_processes
        loss_of_step: Tensor | float = 0.0
        for part in range(options.accumulate):
            indices, batch = next(batches)
            batch = data.to_device(batch, self.accelerator.device)
            args, kwargs, labels = data.split_batch(batch)
            last = part == options.accumulate - 1
            with self.held.accumulating(last):
                losses = self.loss(args, kwargs, labels, indices) * (len(labels) / share)
                self.accelerator.backward(losses[0])
            loss_of_step = loss_of_step + losses.detach()
        self.check(loss_of_step)
        if self.distiller:
            self.distiller.reduce_gradients()
        if options.clip_grad_norm is not None:
            self.held.clip(self.trained, options.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        finished = self.step == plan.total_steps
        epoch_ends = self.step % plan.steps_per_epoch == 0
        if self.ema:
            self.ema.update(self.trained, self.step)
            if finished:
                with torch.no_grad():
                    torch._foreach_copy_(self.trained, self.ema.means)
        for controller in self.controllers:
            controller.update(self.model, self.step, plan.total_steps, epoch_ends)
        if epoch_ends or finished:
            self.end_epoch(options.lr * factor)
        late = time.monotonic() - self.saved >= options.checkpoint_seconds
        if epoch_ends or finished or self.held.agree(late):
            self.save()

    def factor(self, step: int) -> float:
        """Of the learning rates, in the step after ``step`` of them."""
        options = self.options
        return learning_rate(options.schedule, options.warmup, step, self.plan.total_steps)

    def loss(self, args: tuple, kwargs: dict, labels: Tensor, indices: list[int]) -> Tensor:
        """The loss, and with a teacher the cross entropy and each of its losses: ``[names]``."""
        options = self.options
        output = self.held(*args, **kwargs)
        logits = logits_of(output).float()
        cross_entropy = logits.new_zeros(())
        if options.ce_weight:
            cross_entropy = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
        loss = options.ce_weight * cross_entropy
        if self.distiller is None:
            return loss[None]
        known = None
        if self.teacher_logits is not None:
            known = self.teacher_logits[indices].to(logits.device)
        with self.accelerator.autocast():
            loss = loss + self.distiller(logits, *args, teacher_output=known, **kwargs)
        return torch.stack([loss, cross_entropy.detach(), *self.distiller.values.values()])

    def note(self) -> str:
        """The last losses by name, for the progress display."""
        if not self.losses:
            return ""
        numbers = [self.losses[-1], *(self.parts[-1] if self.parts else [])]
        return "  ".join(f"{n} {v:.4f}" for n, v in zip(self.names, numbers, strict=True))

    @property
    def names(self) -> list[str]:
        return ["loss", *(["cross_entropy", *self.distiller.names] if self.distiller else [])]

    def check(self, loss: Tensor | None = None) -> None:
        """Stop at a loss that is not finite; with ``None``, look at all that wait."""
        if loss is not None:
            self.unchecked.append((self.step + 1, loss))
            if loss.device.type != "cpu" and len(self.unchecked) < _LOSSES_BETWEEN_CHECKS:
                return
        for step, value in self.unchecked:
            number, *parts = value.tolist()
            if not math.isfinite(number):
                raise FloatingPointError(
                    f"the loss is {number} at step {step} of {self.plan.total_steps}; "
                    f"a lower lr than {self.options.lr} or clip_grad_norm may help"
                )
            self.losses.append(number)
            if parts:
                self.parts.append(parts)
            if self.curves:
                values = dict(zip(self.names, [number, *parts], strict=True))
                lr = self.options.lr * self.factor(step - 1)
                self.curves.write(step, {f"loss/{n}": v for n, v in values.items()} | {"lr": lr})
        self.unchecked.clear()

    def end_epoch(self, lr: float) -> None:
        self.check()
        columns = zip(self.names, [self.losses, *zip(*self.parts, strict=True)], strict=True)
        self.history.append(
            {
                "epoch": self.step / self.plan.steps_per_epoch,
                **{name: round(sum(column) / len(column), 5) for name, column in columns},
                "lr": lr,
                "seconds": round(self.seconds + time.monotonic() - self.resumed, 1),
            }
        )
        self.losses, self.parts = [], []

    def save(self) -> None:
        self.check()
        self.saved = time.monotonic()
        if self.curves:
            # No checkpoint is further than the curves.
            self.curves.flush()
        if self.checkpoint is None:
            return
        model, optimizer = self.held.states()
        if not self.accelerator.is_main_process:
            return
        checkpoints.save(
            self.checkpoint,
            {
                "step": self.step,
                "model": model,
                "optimizer": optimizer,
                "sharded": is_sharded(self.accelerator),
                "ema": self.ema.means if self.ema else [],
                "scaler": scaler.state_dict() if (scaler := self.accelerator.scaler) else None,
                "history": self.history,
                "losses": self.losses,
                "parts": self.parts,
                "regressors": self.distiller.state_dict() if self.distiller else {},
                "seconds": self.seconds + time.monotonic() - self.resumed,
            },
        )
