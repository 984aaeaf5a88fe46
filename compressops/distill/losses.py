"""What every distillation loss is, and the loss on logits."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.formats.registry import Axis, check_choice, check_fraction


class DistillLoss(Axis, abc.ABC):
    """A loss between what student and teacher compute; ``weight`` is its factor λ in the total.

    A loss is a formula, ``loss(student, teacher)``, on tensors that come from anywhere. What it
    says besides, `Distiller` and `Retrain` need to find these tensors in two models.
    """

    weight: float
    # Learned maps take the student's tensors to the teacher's shape.
    regressor: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """Scalar loss, without its weight; no gradient for the teacher."""

    def layer_pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """``(layer of the student, layer of the teacher)`` whose outputs are compared; none means
        the logits.

        Raises:
            ValueError: a name matches no layer, or the layers do not pair up.
        """
        return []

    def read(
        self, outputs: Sequence[Tensor], model: nn.Module, names: Sequence[str], inputs: Mapping
    ) -> list[Tensor]:
        """What the loss compares, made of the ``outputs`` of the layers ``names`` of ``model``,
        which was called with the keyword arguments ``inputs``."""
        return list(outputs)


@dataclass(frozen=True)
class LogitsKD(DistillLoss):
    """Match the teacher's logits (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        temperature: T; logits are divided by it.
        kind: ``"kl"``: T² · KL(teacher ‖ student), whose gradient does not shrink with T;
            ``"soft_ce"``: T² · cross entropy with the teacher's probabilities, the same gradient
            and another constant; ``"mse"``: mean squared difference of the logits over T (Ba &
            Caruana 2014, arXiv 1312.6184, eq. 1, without the ½ and as a mean); ``"lp"``: ‖·‖_p of
            that difference.
        weight: factor in the total loss.
        p: of ``"lp"``, from 1 up.

    Each is the mean over all positions before the last dimension. Computed in float32, or in
    float64 where logits are.
    """

    temperature: float = 4.0
    kind: str = "kl"
    weight: float = 1.0
    p: float = 2.0

    def __post_init__(self) -> None:
        check_fraction("LogitsKD", "temperature", self.temperature, 1e-6, 1e6)
        check_choice("LogitsKD", "kind", self.kind, ("kl", "soft_ce", "mse", "lp"))
        check_fraction("LogitsKD", "weight", self.weight, 0, 1e9)
        check_fraction("LogitsKD", "p", self.p, 1, 1e3)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits ``[..., classes]`` of equal shape."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"LogitsKD: student logits {list(student.shape)} and teacher logits "
                f"{list(teacher.shape)} differ in shape"
            )
        student = exact(student).reshape(-1, student.shape[-1]) / self.temperature
        teacher = exact(teacher.detach()).reshape(-1, teacher.shape[-1]) / self.temperature
        if self.kind == "mse":
            return F.mse_loss(student, teacher)
        if self.kind == "lp":
            return torch.linalg.vector_norm(student - teacher, self.p, dim=1).mean()
        log_p = F.log_softmax(student, dim=-1)
        if self.kind == "soft_ce":
            loss = -(F.softmax(teacher, dim=-1) * log_p).sum(-1).mean()
        else:
            log_q = F.log_softmax(teacher, dim=-1)
            loss = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return loss * self.temperature**2


def exact(x: Tensor) -> Tensor:
    """``x`` in float64 if it is, else in float32: half precision is too coarse for sums."""
    return x if x.dtype == torch.float64 else x.float()


def check_flag(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be true or false, got {value!r}")


def pairs(owner: str, student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """``(student, teacher)`` tensors one by one, of two tensors or two lists of equal length; the
    teacher's without gradient.

    Raises:
        ValueError: lists of different length, or of none.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"{owner} compares as many tensors of the student as of the teacher, at least one: "
            f"got {len(students)} and {len(teachers)}"
        )
    return [(s, t.detach()) for s, t in zip(students, teachers, strict=True)]
