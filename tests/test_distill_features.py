"""Losses on activations and attention maps against their papers' formulas, in float64 by loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compressops.distill import ActivationKD, AttentionMapKD

SHAPES = [(3, 4, 5, 5), (1, 1, 1, 1), (2, 3, 1, 7), (2, 5), (2, 6, 3), (2, 3, 2, 3, 2)]


def _pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).double(), torch.randn(shape).double()


def _activation(kind: str, p: float, student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        gaps = [abs(a - b) for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)]
        total += {
            "mse": sum(g * g for g in gaps) / len(gaps),
            "half_squares": sum(g * g for g in gaps) / 2,
            "lp": sum(g**p for g in gaps) ** (1 / p),
        }[kind]
    return total / len(student)


def _map(x: Tensor, m: float, mean: bool) -> list[float]:
    """p of one sample ``[C, places]``, divided by its norm."""
    columns = x.T.tolist()
    q = [sum(abs(v) ** m for v in column) / (len(column) if mean else 1) for column in columns]
    return [v / math.sqrt(sum(w * w for w in q)) for v in q]


def _attention(loss: AttentionMapKD, student: Tensor, teacher: Tensor) -> float:
    total, places = 0.0, 0
    for s, t in zip(student, teacher, strict=True):
        mean = loss.reduction == "mean"
        gaps = [
            abs(a - b) for a, b in zip(_map(s, loss.m, mean), _map(t, loss.m, mean), strict=True)
        ]
        places = len(gaps)
        if loss.form == "norm":
            total += sum(g**loss.p for g in gaps) ** (1 / loss.p) / 2
        else:
            total += sum(g * g for g in gaps)
    return total / len(student) / (1 if loss.form == "norm" else places)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "p"), [("mse", 2), ("half_squares", 2), ("lp", 1), ("lp", 2.5)])
def test_activations(shape: tuple[int, ...], kind: str, p: float) -> None:
    loss = ActivationKD("*", kind=kind, p=p)
    (a, b), (c, d) = _pair(shape), _pair((2, 7))
    assert loss(a, b).item() == pytest.approx(_activation(kind, p, a, b))
    wanted = _activation(kind, p, a, b) + _activation(kind, p, c, d)
    assert loss([a, c], [b, d]).item() == pytest.approx(wanted)


@pytest.mark.parametrize("m", [0.5, 1, 2, 3.5])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("form", "p"), [("norm", 1), ("norm", 2), ("norm", 3), ("mse", 2)])
def test_attention_maps(m: float, reduction: str, form: str, p: float) -> None:
    loss = AttentionMapKD("*", m=m, reduction=reduction, form=form, p=p)
    student = torch.randn(3, 4, 12).double()
    teacher = torch.randn(3, 9, 12).double()
    wanted = _attention(loss, student, teacher)
    found = loss(student.unflatten(-1, (3, 4)), teacher.unflatten(-1, (3, 4)))
    assert found.item() == pytest.approx(wanted)
    # A sequence has its channels last.
    assert loss(student.mT, teacher.mT).item() == pytest.approx(wanted)
    both = loss([student.mT, student.mT], [teacher.mT, teacher.mT])
    assert both.item() == pytest.approx(2 * wanted)


@pytest.mark.parametrize(
    "loss",
    [
        ActivationKD("*"),
        ActivationKD("*", kind="half_squares"),
        ActivationKD("*", kind="lp", p=3.0),
        AttentionMapKD("*", m=1.0),
        AttentionMapKD("*", m=2.0, form="mse"),
        AttentionMapKD("*", m=0.5, p=1.5, reduction="mean"),
    ],
)
def test_gradients(loss) -> None:
    student, teacher = _pair((2, 3, 2, 2))
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student.requires_grad_())
    # Dead layers and twins have finite gradients, and the teacher has none.
    for value in (torch.zeros_like(teacher), teacher.clone()):
        x, t = value.requires_grad_(), teacher.clone().requires_grad_()
        loss(x, t).backward()
        assert x.grad.isfinite().all()
        assert t.grad is None
    zeros = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    assert loss(zeros.requires_grad_(), zeros.clone()).isfinite()


def test_other_sizes_are_averaged_down() -> None:
    small, large = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 4)
    blocks = large.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-1, -3))
    loss = ActivationKD("*")
    torch.testing.assert_close(loss(small, large), loss(small, blocks))
    torch.testing.assert_close(loss(large, small), loss(blocks, small))
    maps = AttentionMapKD("*")
    blocks = maps.map(large).unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-1, -3)).sqrt()
    torch.testing.assert_close(maps(small, large), maps(small, blocks))


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(2, 3, 8, 8) * 200, torch.randn(2, 3, 8, 8) * 200
    for loss in (AttentionMapKD("*"), ActivationKD("*", kind="half_squares")):
        found = loss(student.half(), teacher.half())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(student, teacher), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationKD(()), r"ActivationKD: layers must be a glob .* got \(\)"),
        (lambda: ActivationKD(3), "ActivationKD: layers must be a glob .* got 3"),
        (lambda: ActivationKD("a", ""), "ActivationKD: teacher_layers must be a glob .* got ''"),
        (lambda: ActivationKD("a", kind="l2"), "kind must be one of mse, half_squares, lp, got"),
        (lambda: ActivationKD("a", p=0.5), "ActivationKD: p must be a number .* got 0.5"),
        (lambda: ActivationKD("a", regressor=1), "regressor must be true or false, got 1"),
        (lambda: ActivationKD("a", dim=9), "ActivationKD: dim must be an integer .* got 9"),
        (lambda: AttentionMapKD("a", m=0), "AttentionMapKD: m must be a number .* got 0"),
        (lambda: AttentionMapKD("a", form="l2"), "form must be one of norm, mse, got 'l2'"),
        (lambda: AttentionMapKD("a", reduction="max"), "reduction must be one of sum, mean, got"),
        (lambda: AttentionMapKD("a", weight=-1.0), "AttentionMapKD: weight must be .* got -1.0"),
        (
            lambda: ActivationKD("a")(torch.zeros(2, 3), torch.zeros(2, 4)),
            r"activations \[2, 3\] of the student and \[2, 4\] of the teacher differ in shape",
        ),
        (
            lambda: AttentionMapKD("a")(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)),
            r"maps \[2, 3, 1\] of the student and \[2, 2, 1\] of the teacher differ",
        ),
        (
            lambda: AttentionMapKD("a", dim=3)(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)),
            r"dim=3 is none of a tensor \[2, 3, 4\]",
        ),
        (
            lambda: ActivationKD("a")([torch.zeros(2)], [torch.zeros(2)] * 2),
            "as many tensors of the student as of the teacher, at least one: got 1 and 2",
        ),
        (lambda: ActivationKD("a")([], []), "at least one: got 0 and 0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
