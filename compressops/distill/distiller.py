"""`Distiller`: a student, its teacher, and the losses between them, in any training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.distill.capture import Taps, logits_of, unwrapped
from compressops.distill.features import channels
from compressops.distill.losses import DistillLoss
from compressops.measure import eval_mode


class Regressor(nn.Module):
    """A learned linear map of the channels: a 1×1 convolution with bias, whatever the dimensions.

    Args:
        in_channels, out_channels: of the student and of the teacher.
        dim: of the channels, from 0.
    """

    def __init__(self, in_channels: int, out_channels: int, dim: int) -> None:
        super().__init__()
        self.linear, self.dim = nn.Linear(in_channels, out_channels), dim

    def forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.dim, -1).to(self.linear.weight.dtype)
        return F.linear(moved, self.linear.weight, self.linear.bias).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Distiller(nn.Module):
    """Σ λᵢ · Lᵢ between a student and its teacher, to be added to a loss of your own.

        kd = Distiller(student, teacher, [LogitsKD(), AttentionMapKD("features.?")])
        with kd:
            for x, labels in batches:
                output = student(x)
                loss = F.cross_entropy(output, labels) + kd(output, x)

    Within the ``with`` block, hooks keep the outputs of the layers that the losses name, and the
    teacher is in eval mode; it runs without gradients. The block's end undoes both. As a module it
    holds the regressors of the losses that learn any, and nothing of the two models: give
    ``kd.parameters()`` to the optimizer too, and keep ``kd.state_dict()`` with a checkpoint. Under
    DDP, `reduce_gradients` before each optimizer step makes them what they are in one process.

    Args:
        student, teacher: models; they may be wrapped by `torch.compile`, DDP or FSDP, and their
            layers are named as without.
        losses: what to compare.
        example: arguments of the models (a tensor, a tuple, or a dict of keyword arguments): both
            run on it once, in eval mode and without gradients, to find where shapes differ. Only
            losses with a regressor need it.
        seed: of the regressors' values.

    Attributes:
        values: the last loss of each, without its weight, by name.

    Raises:
        ValueError: a name matches no layer, layers do not pair up, or student and teacher are one.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: DistillLoss | Sequence[DistillLoss],
        example: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        inner, teacher_inner = unwrapped(student), unwrapped(teacher)
        if inner is teacher_inner:
            raise ValueError("student and teacher are one model; give a copy as the teacher")
        self.losses = (losses,) if isinstance(losses, DistillLoss) else tuple(losses)
        for loss in self.losses:
            if not isinstance(loss, DistillLoss):
                raise TypeError(f"losses must be DistillLoss, got {loss!r}")
        # In a tuple, or they would be parts of this module.
        self._models = student, teacher
        self._pairs = [loss.layer_pairs(inner, teacher_inner) for loss in self.losses]
        self._taps = [
            Taps(model, [pair[side] for pairs in self._pairs for pair in pairs])
            for side, model in enumerate(self._models)
        ]
        self.names = _names(self.losses)
        self.values: dict[str, Tensor] = {}
        self.regressors = nn.ModuleDict()
        if example is not None:
            kwargs = example if isinstance(example, dict) else {}
            args = () if kwargs else example if isinstance(example, (tuple, list)) else (example,)
            self.fit_shapes(args, kwargs, seed)
        self._block = contextlib.ExitStack()

    def __enter__(self) -> Distiller:
        with contextlib.ExitStack() as block:
            block.enter_context(eval_mode(self._models[1]))
            for taps in self._taps:
                block.enter_context(taps)
            self._block = block.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._block.close()

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to run: logits alone may come from elsewhere."""
        return any(self._pairs)

    def forward(self, output: Any, *args: Any, teacher_output: Any = None, **kwargs: Any) -> Tensor:
        """Σ λᵢ · Lᵢ of the student's last call.

        Args:
            output: what the student returned: logits, or what holds them.
            args, kwargs: what the student was called with; the teacher is called with the same.
            teacher_output: logits of the teacher, if they are known; it is not run then. For losses
                on logits alone.

        Raises:
            ValueError: ``teacher_output`` with losses on layers; see also `Taps.take`.
        """
        if teacher_output is not None and self.needs_teacher:
            raise ValueError(
                "teacher_output serves losses on logits alone; the others read the teacher's layers"
            )
        mine = [self._read(0, i, kwargs) for i in range(len(self.losses))]
        if teacher_output is None:
            with torch.no_grad():
                teacher_output = self._models[1](*args, **kwargs)
        its = [self._read(1, i, kwargs) for i in range(len(self.losses))]
        for taps in self._taps:
            taps.clear()
        total = torch.zeros((), device=logits_of(output).device)
        for i, (name, loss) in enumerate(zip(self.names, self.losses, strict=True)):
            if self._pairs[i]:
                value = loss(self._mapped(i, mine[i], its[i]), its[i])
            else:
                value = loss(logits_of(output), logits_of(teacher_output))
            self.values[name] = value.detach()
            total = total + loss.weight * value
        return total

    @torch.no_grad()
    def fit_shapes(self, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int = 0) -> None:
        """Make the regressors that are needed, as ``example`` does: from one call of both models,
        in eval mode. No random generator moves."""
        if not any(loss.regressor for loss in self.losses):
            return
        with contextlib.ExitStack() as stack:
            for model, taps in zip(self._models, self._taps, strict=True):
                stack.enter_context(eval_mode(model))
                stack.enter_context(taps)
                model(*args, **kwargs)
            reads = [
                (self._read(0, i, kwargs), self._read(1, i, kwargs))
                for i in range(len(self.losses))
            ]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for i, (loss, read) in enumerate(zip(self.losses, reads, strict=True)):
                for j, (s, t) in enumerate(zip(*read, strict=True)):
                    if not loss.regressor or s.dim() != t.dim():
                        continue
                    dim = channels(s, getattr(loss, "dim", None))
                    if s.shape[dim] != t.shape[dim]:
                        made = Regressor(s.shape[dim], t.shape[dim], dim)
                        self.regressors[f"{i}_{j}"] = made.to(s.device)

    def reduce_gradients(self) -> None:
        """The regressors' gradients become their mean over the processes, as DDP does it with the
        student's. Nothing to do in one process."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        world = torch.distributed.get_world_size()
        for parameter in self.parameters():
            if parameter.grad is not None and world > 1:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world

    def _read(self, side: int, i: int, kwargs: dict) -> list[Tensor]:
        names = [pair[side] for pair in self._pairs[i]]
        taps, model = self._taps[side], self._models[side]
        return self.losses[i].read(taps.take(names), model, names, kwargs)

    def _mapped(self, i: int, student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
        mapped = []
        for j, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if (key := f"{i}_{j}") in self.regressors:
                s = self.regressors[key](s)
            elif self.losses[i].regressor and s.dim() == t.dim():
                dim = channels(s, getattr(self.losses[i], "dim", None))
                if s.shape[dim] != t.shape[dim]:
                    mine, its = self._pairs[i][j]
                    raise ValueError(
                        f"layer {mine!r} of the student has {s.shape[dim]} channels and {its!r} of "
                        f"the teacher {t.shape[dim]}: a regressor between them needs example="
                    )
            mapped.append(s)
        return mapped


def _names(losses: Sequence[DistillLoss]) -> list[str]:
    """The class names, with a number from the second of one kind on."""
    names: list[str] = []
    for i, loss in enumerate(losses):
        kind = type(loss).__name__
        earlier = sum(type(other) is type(loss) for other in losses[:i])
        names.append(f"{kind}.{earlier + 1}" if earlier else kind)
    return names
