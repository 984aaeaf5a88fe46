"""The optimizers of `Retrain`, over the tensors that parametrizations train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class MuonWithSGD(torch.optim.Optimizer):
    """Muon (Jordan 2024) for matrices, SGD with Nesterov momentum for everything else.

    Args:
        matrices: tensors of two or more dimensions; each is updated as its view ``[out, rest]``.
        others: all other tensors.
        norms: of each matrix, what it counts by; ``lr`` is relative to it. A plain Muon step has
            the norm lr · √out, so the step is scaled by norm / √out: a matrix of another scale
            trains alike.
        lr, other_lr: learning rates of the two.
        momentum: of both.
        weight_decay: of the matrices, and of ``others`` of two or more dimensions.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        norms: list[float],
        others: list[nn.Parameter],
        lr: float,
        other_lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        groups = [{"params": matrices, "lr": lr}]
        parts = []
        if matrices:
            # Muon takes matrices only: views that share the memory of the filters.
            self._views = [nn.Parameter(p.detach().view(len(p), -1)) for p in matrices]
            parts.append(
                torch.optim.Muon(
                    [{"params": [view]} for view in self._views],
                    lr,
                    momentum=momentum,
                    nesterov=True,
                    weight_decay=weight_decay,
                )
            )
        else:
            groups, self._views = [], []
        for decay, params in _by_decay(others, weight_decay):
            groups.append({"params": params, "lr": other_lr})
            parts.append(
                torch.optim.SGD(
                    params, other_lr, momentum, nesterov=momentum > 0, weight_decay=decay
                )
            )
        self._matrices = matrices
        self._scales = [norm / len(p) ** 0.5 for norm, p in zip(norms, matrices, strict=True)]
        self._parts = parts
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, part in zip(self.param_groups, self._parts, strict=True):
            scales = self._scales if isinstance(part, torch.optim.Muon) else [1.0]
            for inner, scale in zip(part.param_groups, scales, strict=True):
                inner["lr"] = group["lr"] * scale
        for view, matrix in zip(self._views, self._matrices, strict=True):
            view.grad = None if matrix.grad is None else matrix.grad.reshape(view.shape)
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts], "scales": self._scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._scales = list(state_dict["scales"])


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    other_lr: float | None,
    momentum: float,
    weight_decay: float,
    extra: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer called ``name`` over the trainable tensors of ``model``, and ``extra`` ones.

    Tensors of fewer than two dimensions (biases, norms) get no weight decay. Muon leaves the last
    matrix (the classifier) to SGD: its rows are classes, whose logits want scales of their own; and
    all extra ones.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    every = [*trained, *extra]
    if name == "sgd":
        return torch.optim.SGD(
            [{"params": p, "weight_decay": d} for d, p in _by_decay(every, weight_decay)],
            lr,
            momentum,
            nesterov=momentum > 0,
        )
    if name == "adamw":
        return torch.optim.AdamW(
            [{"params": p, "weight_decay": d} for d, p in _by_decay(every, weight_decay)], lr
        )
    matrices = [p for p in trained if p.dim() >= 2][:-1]
    for matrix in matrices:
        # The [out, rest] view exists of contiguous memory only, not of channels_last.
        matrix.data = matrix.data.contiguous()
    norms = _norms(model, matrices)
    chosen = {id(p) for p in matrices}
    others = [p for p in every if id(p) not in chosen]
    return MuonWithSGD(
        matrices,
        norms,
        others,
        lr,
        lr if other_lr is None else other_lr,
        momentum,
        weight_decay,
    )


@torch.no_grad()
def _norms(model: nn.Module, matrices: list[nn.Parameter]) -> list[float]:
    """Norm of each matrix, as the model computes with it: pruned and quantized."""
    norms = {id(p): p.norm().item() for p in matrices}
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            norms[id(module.parametrizations["weight"].original)] = module.weight.norm().item()
    return [norms[id(p)] or 1.0 for p in matrices]


def _by_decay(
    params: list[nn.Parameter], weight_decay: float
) -> list[tuple[float, list[nn.Parameter]]]:
    wide = [p for p in params if p.dim() >= 2]
    narrow = [p for p in params if p.dim() < 2]
    return [(decay, group) for decay, group in ((weight_decay, wide), (0.0, narrow)) if group]


def learning_rate(schedule: str, warmup: float, step: int, total_steps: int) -> float:
    """The factor on the peak learning rate at ``step`` (from 0) of ``total_steps``."""
    rising = warmup * total_steps
    if step + 1 < rising:
        return (step + 1) / rising
    # The last step still has a rate above 0, and the first after the warm-up the full one.
    progress = max(0.0, step - rising) / max(1.0, total_steps - rising)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1 + math.cos(math.pi * progress))


class Ema:
    """Running mean of tensors: mean ← decay · mean + (1 − decay) · tensor."""

    def __init__(self, tensors: list[Tensor], decay: float) -> None:
        self.decay = decay
        self.means = [t.detach().clone() for t in tensors]

    @torch.no_grad()
    def update(self, tensors: list[Tensor], step: int) -> None:
        # Early on the mean follows faster, or it would remember the start for ever.
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, [t.detach() for t in tensors], 1 - decay)
