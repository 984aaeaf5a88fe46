"""Distillation losses: what a student learns from its teacher."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressops.formats.registry import Axis, check_choice, check_fraction


class DistillLoss(Axis, abc.ABC):
    """A loss between the outputs of student and teacher; ``weight`` is its factor in the total."""

    weight: float

    @abc.abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar loss of logits ``[..., classes]`` of equal shape; no gradient for the teacher."""


@dataclass(frozen=True)
class LogitsKD(DistillLoss):
    """Match the teacher's logits (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        temperature: T; logits are divided by it.
        kind: ``"kl"``: T² · KL(teacher ‖ student), whose gradient does not shrink with T;
            ``"soft_ce"``: T² · cross entropy with the teacher's probabilities, the same gradient
            and another constant; ``"mse"``: mean squared difference of the logits over T.
        weight: factor in the total loss.

    Each is the mean over all positions before the last dimension. Computed in float32.
    """

    temperature: float = 4.0
    kind: str = "kl"
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("LogitsKD", "temperature", self.temperature, 1e-6, 1e6)
        check_choice("LogitsKD", "kind", self.kind, ("kl", "soft_ce", "mse"))
        check_fraction("LogitsKD", "weight", self.weight, 0, 1e9)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"LogitsKD: student logits {list(student.shape)} and teacher logits "
                f"{list(teacher.shape)} differ in shape"
            )
        student = student.float().reshape(-1, student.shape[-1]) / self.temperature
        teacher = teacher.detach().float().reshape(-1, teacher.shape[-1]) / self.temperature
        if self.kind == "mse":
            return F.mse_loss(student, teacher)
        log_p = F.log_softmax(student, dim=-1)
        if self.kind == "soft_ce":
            loss = -(F.softmax(teacher, dim=-1) * log_p).sum(-1).mean()
        else:
            log_q = F.log_softmax(teacher, dim=-1)
            loss = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return loss * self.temperature**2


def total_loss(
    cross_entropy: Tensor | float,
    losses: tuple[DistillLoss, ...],
    student: Tensor,
    teacher: Tensor | None,
) -> Tensor:
    """``cross_entropy`` + Σ weight · loss(student, teacher)."""
    total = torch.as_tensor(cross_entropy, device=student.device)
    for loss in losses:
        total = total + loss.weight * loss(student, teacher)
    return total
