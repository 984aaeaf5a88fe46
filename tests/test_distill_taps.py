"""Taps and `Distiller`: nothing of the model changes, and every wrapper is seen through."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressops.distill import ActivationKD, AttentionMapKD, Distiller, LogitsKD, Taps
from compressops.zoo.cifarnet import CifarNet


class Checkpointed(nn.Module):
    """Three blocks whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x.mean((2, 3))


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _models() -> tuple[CifarNet, CifarNet, Tensor]:
    torch.manual_seed(3)
    return CifarNet(width=0.1), CifarNet(width=0.2).eval(), torch.randn(4, 3, 16, 16)


LOSSES = [LogitsKD(), ActivationKD("features.[47]"), AttentionMapKD("features.?", weight=10.0)]


def test_outputs_stay_the_same_bits_and_hooks_go() -> None:
    student, teacher, x = _models()
    twin = copy.deepcopy(student)
    torch.manual_seed(5)
    wanted = twin(x)
    wanted.square().mean().backward()
    # Blocks whose last layer works in place, and layers before them.
    names = ["features.0", "features.3.2", "features.6", "classifier"]
    with Taps(student, names) as taps:
        torch.manual_seed(5)
        found = student(x)
        assert torch.equal(found, wanted)
        assert [t.shape[1] for t in taps.take(names)] == [6, 13, 19, 10]
        found.square().mean().backward()
    assert _hooks(student) == 0
    for mine, its in zip(student.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)
    for mine, its in zip(student.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, its)
    with Distiller(student, teacher, LogitsKD()):
        assert _hooks(student) == _hooks(teacher) == 0


def test_what_the_taps_read() -> None:
    student, _, x = _models()
    student.eval()
    with Taps(student, ["features.0", "features.1"]) as taps:
        student(x)
        found = taps.take(["features.1", "features.0"])
    first = student.features[0](x)
    assert torch.equal(found[1], first)
    assert torch.equal(found[0], student.features[1](first))


def test_the_distiller_computes_the_weighted_sum() -> None:
    student, teacher, x = _models()
    kd = Distiller(student, teacher.train(), LOSSES, example=x)
    assert [tuple(p.shape) for p in kd.parameters()] == [(26, 13), (26,), (38, 19), (38,)]
    with kd:
        assert not teacher.training
        output = student(x)
        total = kd(output, x)
    assert teacher.training
    teacher.eval()
    with torch.no_grad(), Taps(teacher, [f"features.{i}" for i in range(8)]) as taps:
        guide = teacher(x)
        its = taps.take(taps.names)
    # With batch norms in training mode a second call gives the same outputs; dropout must, too.
    torch.manual_seed(0)
    with kd, Taps(student, taps.names) as mine:
        output = student(x)
        total = kd(output, x)
        features = mine.take(mine.names)
    assert list(kd.values) == ["LogitsKD", "ActivationKD", "AttentionMapKD"]
    r = kd.regressors
    values = [
        LOSSES[0](output, guide),
        LOSSES[1]([r["1_0"](features[4]), r["1_1"](features[7])], [its[4], its[7]]),
        LOSSES[2](features, its),
    ]
    for found, wanted in zip(kd.values.values(), values, strict=True):
        torch.testing.assert_close(found, wanted.detach())
    torch.testing.assert_close(total, values[0] + values[1] + 10 * values[2])
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in [*kd.parameters(), student.features[0][0].weight])


def test_regressors_are_a_1x1_convolution_that_learns() -> None:
    student, teacher, x = _models()
    kd = Distiller(student, teacher, ActivationKD("features.4"), example=x, seed=1)
    again = Distiller(student, teacher, ActivationKD("features.4"), example=(x,), seed=1)
    (mine,), (its,) = kd.regressors.values(), again.regressors.values()
    assert torch.equal(mine.linear.weight, its.linear.weight)
    features = torch.randn(2, 13, 3, 3)
    wanted = F.conv2d(features, mine.linear.weight[:, :, None, None], mine.linear.bias)
    torch.testing.assert_close(mine(features), wanted)
    optimizer = torch.optim.Adam([*student.parameters(), *kd.parameters()], 0.01)
    losses = []
    with kd:
        for _ in range(15):
            loss = kd(student(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert set(student.state_dict()) == set(CifarNet(width=0.1).state_dict())
    again.load_state_dict(kd.state_dict())


def test_known_logits_spare_the_teacher() -> None:
    student, teacher, x = _models()
    with torch.no_grad():
        logits = teacher(x)
    teacher.forward = None
    with Distiller(student, teacher, LogitsKD()) as kd:
        output = student(x)
        torch.testing.assert_close(kd(output, teacher_output=logits), LogitsKD()(output, logits))
    with (
        Distiller(student, teacher, AttentionMapKD("features.0")) as kd,
        pytest.raises(ValueError, match="teacher_output serves losses on logits alone"),
    ):
        kd(student(x), teacher_output=logits)


def test_activation_checkpointing() -> None:
    torch.manual_seed(0)
    plain, teacher = Checkpointed(None), Checkpointed(None)
    x = torch.randn(2, 3, 5, 5)
    gradients = []
    for reentrant in (None, False):
        model = copy.deepcopy(plain)
        model.reentrant = reentrant
        with Distiller(model, teacher, ActivationKD("blocks.?")) as kd:
            for _ in range(2):
                kd(model(x), x).backward()
        gradients.append([p.grad for p in model.parameters()])
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its)
    model.reentrant = True
    with (
        Distiller(model, teacher, ActivationKD("blocks.?")) as kd,
        pytest.raises(ValueError, match=r"ran without gradients: .* needs use_reentrant=False"),
    ):
        kd(model(x.requires_grad_()), x)


@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_models(how: str) -> None:
    torch.manual_seed(0)
    student, teacher = Checkpointed(None), Checkpointed(None)
    loss = ActivationKD("blocks.?")
    x = torch.randn(2, 3, 5, 5)
    with Distiller(student, teacher, loss) as kd:
        wanted = kd(student(x), x)
        (weights,) = torch.autograd.grad(wanted, [student.blocks[0][0].weight])
    compiled = student
    if how == "function":
        compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    else:
        student.compile(fullgraph=True, backend="aot_eager")
    output = compiled(x)
    # It was compiled before there were taps, and is used after them.
    for _ in range(2):
        with Distiller(compiled, teacher, loss) as kd:
            found = kd(compiled(x), x)
        torch.testing.assert_close(found, wanted)
        (mine,) = torch.autograd.grad(found, [student.blocks[0][0].weight])
        torch.testing.assert_close(mine, weights)
        torch.testing.assert_close(compiled(x), output)
    assert _hooks(student) == 0


def test_a_compiled_model_whose_outputs_are_overwritten() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    with Taps(compiled, ["0"]) as taps:
        compiled(x)
        torch.testing.assert_close(taps.take(["0"])[0], student[0](x))
    with Taps(student, ["0"]) as taps:
        student(x)
        with pytest.raises(ValueError, match="overwritten in place"):
            taps.take(["0"])


def test_layers_that_run_otherwise_than_once() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.ModuleList([nn.Linear(3, 3)])[0])
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    teacher = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x = torch.randn(2, 3)
    for name, times in (("0", 2), ("spare", 0)):
        with Taps(model, [name]) as taps:
            model(x)
            with pytest.raises(ValueError, match=f"ran {times} times"):
                taps.take([name])
    with Distiller(model, teacher, ActivationKD("1")) as kd:
        with pytest.raises(ValueError, match=r"ran 0 times in the last call .* call the model"):
            kd(x, x)
        output = model(x)
        kd(output, x)
        with pytest.raises(ValueError, match="ran 0 times"):
            kd(output, x)
        # What is recorded is that of the last call.
        model(x)
        kd(model(x), x)
    with Taps(model, ["1"]) as taps, pytest.raises(RuntimeError, match="in place already"):
        taps.__enter__()


def test_in_double_and_half_precision_of_autocast() -> None:
    student, teacher, x = _models()
    kd = Distiller(student, teacher, LOSSES, example=x)
    with kd, torch.autocast("cpu", torch.bfloat16):
        loss = kd(student(x), x)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in kd.parameters())


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (ActivationKD("body.*"), r"ActivationKD: layers: 'body.\*' matches no layer; the model's"),
        (
            ActivationKD("features.?", "classifier"),
            r"8 layers of the student \(features.0, .*\) cannot pair with 1 of the teacher",
        ),
        (
            ActivationKD("features.0", "head"),
            "ActivationKD: teacher_layers: 'head' matches no layer",
        ),
    ],
)
def test_bad_layers(losses, message: str) -> None:
    student, teacher, _ = _models()
    with pytest.raises(ValueError, match=message):
        Distiller(student, teacher, losses)


def test_bad_arguments() -> None:
    student, teacher, x = _models()
    with pytest.raises(ValueError, match="student and teacher are one model"):
        Distiller(student, student, LogitsKD())
    with pytest.raises(TypeError, match="losses must be DistillLoss, got 'kl'"):
        Distiller(student, teacher, ["kl"])
    with (
        Distiller(student, teacher, ActivationKD("features.0")) as kd,
        pytest.raises(ValueError, match=r"has 6 channels and .* 13: a regressor between them"),
    ):
        kd(student(x), x)
    model = nn.Sequential(nn.Identity())
    model[0].forward = partial(str)
    with Taps(model, ["0"]), pytest.raises(TypeError, match="gave no tensor, but str"):
        model(x)


def test_order_of_layers_is_the_callers() -> None:
    student, teacher, x = _models()
    loss = AttentionMapKD(("features.7", "features.0"))
    assert loss.layer_pairs(student, teacher) == [("features.7",) * 2, ("features.0",) * 2]
    with Distiller(student, teacher, [loss, loss]) as kd:
        kd(student(x), x)
        assert list(kd.values) == ["AttentionMapKD", "AttentionMapKD.2"]
