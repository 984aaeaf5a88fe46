"""Losses on what layers within the networks put out: activations, and maps of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.distill.capture import paired
from compressops.distill.losses import DistillLoss, check_flag, exact, pairs
from compressops.formats.registry import check_choice, check_fraction, check_int

_POOLS = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class _LayersKD(DistillLoss):
    """A loss summed over pairs of layers, which globs over module paths name."""

    layers: str | tuple[str, ...]
    teacher_layers: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("layers", "teacher_layers"):
            value = getattr(self, name)
            if value is None and name == "teacher_layers":
                continue
            globs = (value,) if isinstance(value, str) else value
            if (
                not isinstance(globs, (tuple, list))
                or not globs
                or not all(isinstance(glob, str) and glob for glob in globs)
            ):
                raise ValueError(
                    f"{owner}: {name} must be a glob over module paths or a list of such, "
                    f"got {value!r}"
                )
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value))
        check_fraction(owner, "p", self.p, 1, 1e3)
        check_fraction(owner, "weight", self.weight, 0, 1e9)
        if self.dim is not None:
            check_int(owner, "dim", self.dim, -8, 8)

    def layer_pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        return paired(type(self).__name__, self.layers, self.teacher_layers, student, teacher)


@dataclass(frozen=True)
class ActivationKD(_LayersKD):
    """Match the activations of layers: Σᵢ g(y_actⁱ, f_actⁱ) over pairs of layers i (FitNets, Romero
    et al. 2015, arXiv 1412.6550, section 2.2, where i is one "hint" layer).

    Args:
        layers: globs over the student's module paths (``"features.?"``); a list of names pairs
            with ``teacher_layers`` in its order.
        teacher_layers: globs over the teacher's; ``None`` is ``layers``.
        kind: g. ``"mse"``: mean squared difference; ``"half_squares"``: ½‖·‖² of a sample's
            difference, as FitNets' equation 3; ``"lp"``: ‖·‖_p of it. The last two are means over
            the samples.
        p: of ``"lp"``, from 1 up.
        regressor: where shapes differ, learn a 1×1 convolution with bias (a linear map of the
            channels) from the student's activations to the teacher's: FitNets' r. It trains along
            with the student and is no part of it.
        dim: of the channels; ``None`` is 1 for tensors of four and more dimensions (images), else
            the last (features, sequences).
        weight: factor in the total loss.

    Where heights and widths differ, the larger activations are averaged to the smaller size.
    Computed in float32, or in float64 where the activations are.
    """

    kind: str = "mse"
    p: float = 2.0
    regressor: bool = True
    dim: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ActivationKD", "kind", self.kind, ("mse", "half_squares", "lp"))
        check_flag("ActivationKD", "regressor", self.regressor)

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """A tensor ``[N, …]`` each, or a list of them; shapes are equal but for the size."""
        total: Tensor | float = 0.0
        for s, t in pairs("ActivationKD", student, teacher):
            s, t = same_size("ActivationKD", exact(s), exact(t))
            if s.shape != t.shape:
                raise ValueError(
                    f"ActivationKD: activations {list(s.shape)} of the student and {list(t.shape)} "
                    "of the teacher differ in shape, and no regressor is between them"
                )
            if self.kind == "mse":
                total = total + F.mse_loss(s, t)
                continue
            rows = (s - t).flatten(1)
            if self.kind == "half_squares":
                total = total + rows.square().sum(1).mean() / 2
            else:
                total = total + torch.linalg.vector_norm(rows, self.p, dim=1).mean()
        return total


@dataclass(frozen=True)
class AttentionMapKD(_LayersKD):
    """Match where layers are active, whatever their channels (Zagoruyko & Komodakis 2017, arXiv
    1612.03928, section 3.1).

    The map of activations A is p(x) = Σ_c |A_c(x)|^m over the channels c at each place x, Q its
    vector. Summed over pairs of layers:

    - ``form="norm"``, equation 2 of the paper: ½ · ‖Q_S/‖Q_S‖₂ − Q_T/‖Q_T‖₂‖_p, the mean of the
      samples; ``weight`` is β.
    - ``form="mse"``, what its reference code computes: the mean over samples and places of
      (Q_S/‖Q_S‖₂ − Q_T/‖Q_T‖₂)², without the ½.

    Args:
        layers, teacher_layers: as of `ActivationKD`. No regressor: channels may differ in number.
        m: exponent, above 0. Larger ones look at the strongest places more.
        reduction: of the channels, ``"sum"`` or ``"mean"``. The normalisation makes them equal but
            for rounding.
        form, p: see above; p is the norm's, from 1 up.
        dim: of the channels; ``None`` is 1 for tensors of four and more dimensions, else the last.
        weight: β.

    Where heights and widths differ, the larger map is averaged to the smaller size. A map of zeros
    stays zero. Computed in float32, or in float64 where the activations are.
    """

    m: float = 2.0
    reduction: str = "sum"
    form: str = "norm"
    p: float = 2.0
    dim: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("AttentionMapKD", "m", self.m, 1e-3, 1e3)
        check_choice("AttentionMapKD", "reduction", self.reduction, ("sum", "mean"))
        check_choice("AttentionMapKD", "form", self.form, ("norm", "mse"))

    def map(self, activations: Tensor) -> Tensor:
        """p: ``[N, C, …]`` to ``[N, 1, …]``, or the like with the channels elsewhere."""
        x = exact(activations)
        if self.m == 2:
            x = x.square()
        else:
            x = x.abs()
            if self.m < 1:
                # The derivative at 0 is infinite; below the least normal number it is 0 so.
                x = x.clamp(min=torch.finfo(x.dtype).tiny)
            x = x.pow(self.m)
        dim = channels(activations, self.dim)
        return x.sum(dim, True) if self.reduction == "sum" else x.mean(dim, True)

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """A tensor ``[N, …]`` each, or a list of them; only the channels may differ in number."""
        total: Tensor | float = 0.0
        for s, t in pairs("AttentionMapKD", student, teacher):
            s, t = same_size("AttentionMapKD", self.map(s), self.map(t))
            if s.shape != t.shape:
                raise ValueError(
                    f"AttentionMapKD: maps {list(s.shape)} of the student and {list(t.shape)} of "
                    "the teacher differ in shape"
                )
            gap = F.normalize(s.flatten(1), dim=1) - F.normalize(t.flatten(1), dim=1)
            if self.form == "mse":
                total = total + gap.square().mean()
            else:
                total = total + torch.linalg.vector_norm(gap, self.p, dim=1).mean() / 2
        return total


def channels(x: Tensor, dim: int | None) -> int:
    """The dimension of the channels, from 0 up."""
    if dim is None:
        return 1 if x.dim() >= 4 else x.dim() - 1
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is none of a tensor {list(x.shape)}")
    return dim % x.dim()


def same_size(owner: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Images ``[N, C, *size]`` brought to the smaller size of the two by averaging."""
    mine, its = student.shape[2:], teacher.shape[2:]
    if student.dim() != teacher.dim() or student.dim() < 4 or mine == its:
        return student, teacher
    size = [min(pair) for pair in zip(mine, its, strict=True)]
    pool = _POOLS.get(student.dim())
    if pool is None:
        raise ValueError(
            f"{owner}: tensors {list(student.shape)} and {list(teacher.shape)} differ in size, and "
            "only those of up to five dimensions can be averaged"
        )
    return pool(student, size), pool(teacher, size)
