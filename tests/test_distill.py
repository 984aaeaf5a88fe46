"""The loss on logits against its formulas in float64, and what every loss shares."""

from __future__ import annotations

import json

import pytest
import torch

from compressops.compress import Recipe, Retrain
from compressops.distill import (
    ActivationKD,
    AttentionMapKD,
    AttentionScoreKD,
    DistillLoss,
    HiddenStateKD,
    LogitsKD,
)


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    exponents = (logits.double() / temperature).exp()
    return exponents / exponents.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 1), (5,)])
def test_values(temperature: float, shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape) * 3, torch.randn(shape) * 3
    p, q = _probabilities(student, temperature), _probabilities(teacher, temperature)
    wanted = {
        "kl": (q * (q.log() - p.log())).sum(-1).mean() * temperature**2,
        "soft_ce": -(q * p.log()).sum(-1).mean() * temperature**2,
        "mse": ((student - teacher).double() / temperature).square().mean(),
    }
    for kind, value in wanted.items():
        found = LogitsKD(temperature, kind)(student, teacher)
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)


def test_kl_and_soft_cross_entropy_have_one_gradient() -> None:
    teacher = torch.randn(6, 4)
    gradients = []
    for kind in ("kl", "soft_ce"):
        student = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        LogitsKD(3.0, kind)(student, teacher).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    LogitsKD()(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_student_like_its_teacher_loses_nothing() -> None:
    logits = torch.randn(4, 3)
    for kind in ("kl", "mse"):
        assert LogitsKD(kind=kind)(logits, logits.clone()) == pytest.approx(0, abs=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (torch.randn(8, 10) * 30 for _ in range(2))
    found = LogitsKD()(student.half(), teacher.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LogitsKD()(student, teacher), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_norms(p: float) -> None:
    student, teacher = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    wanted = (((student - teacher).abs() / 2) ** p).sum(-1).pow(1 / p).mean()
    torch.testing.assert_close(LogitsKD(2.0, "lp", p=p)(student, teacher), wanted)


@pytest.mark.parametrize("kind", ["kl", "soft_ce", "mse", "lp"])
def test_gradients(kind: str) -> None:
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: LogitsKD(3.0, kind, p=3.0)(x, teacher), student)
    # Where student and teacher agree, a norm has no derivative; 0 is taken.
    twin = teacher.clone().requires_grad_()
    LogitsKD(3.0, kind)(twin, teacher).backward()
    assert twin.grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, r"LogitsKD: temperature must be .* got 0"),
        ({"temperature": "4"}, r"LogitsKD: temperature must be .* got '4'"),
        ({"kind": "js"}, r"LogitsKD: kind must be one of kl, soft_ce, mse, lp, got 'js'"),
        ({"weight": -1}, r"LogitsKD: weight must be .* got -1"),
        ({"p": 0.5}, r"LogitsKD: p must be .* got 0.5"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitsKD(**arguments)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"student logits \[4, 3\] and teacher logits \[4, 2\]"):
        LogitsKD()(torch.zeros(4, 3), torch.zeros(4, 2))


@pytest.mark.parametrize(
    "loss",
    [
        LogitsKD(2.0, "mse", 0.5),
        ActivationKD(("a.*", "b"), "c", kind="lp", p=3.0, regressor=False, dim=-1),
        AttentionMapKD("a", m=1.0, form="mse", weight=1000.0),
        AttentionScoreKD(mapping=(0, 2), heads=4, causal=True),
        HiddenStateKD(embeddings=None, mapping="last"),
    ],
)
def test_specs(loss: DistillLoss) -> None:
    spec = json.loads(json.dumps(loss.to_spec()))
    assert DistillLoss.from_spec(spec) == loss
    recipe = Recipe([Retrain(steps=1, distill=loss)])
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_unknown_losses() -> None:
    with pytest.raises(ValueError, match="unknown distillloss 'Hints': known are ActivationKD"):
        DistillLoss.from_spec({"type": "Hints"})
