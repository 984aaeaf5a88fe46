"""Pruning: exact densities, schedules, and masks that hold."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressops.compress import Prune, Recipe, Retrain, record
from compressops.compress.parametrizations import Mask, find
from compressops.compress.select import select, weight_layers
from compressops.formats import BlockSparse, Sparse


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 7, 1, bias=False),
        nn.Flatten(),
        nn.Linear(7 * 36, 5),
    )


def masks(model: nn.Module) -> list[torch.Tensor]:
    return [find(m, Mask).mask for m in model.modules() if find(m, Mask) is not None]


def kept(model: nn.Module) -> tuple[int, int]:
    return sum(int(m.sum()) for m in masks(model)), sum(m.numel() for m in masks(model))


@settings(max_examples=15)
@given(st.floats(0.001, 1.0), st.sampled_from(["magnitude", "lamp"]))
def test_global_density_is_met_to_the_entry(density: float, score: str) -> None:
    torch.manual_seed(0)
    model = network()
    Prune(density, scope="global", score=score).attach(model)
    count, total = kept(model)
    assert count == max(1, round(density * total))


@settings(max_examples=15)
@given(st.floats(0.001, 1.0))
def test_density_by_layer_keeps_the_largest(density: float) -> None:
    torch.manual_seed(0)
    model = network()
    before = {n: m.weight.detach().clone() for n, m in weight_layers(model).items()}
    Prune(density).attach(model)
    for name, module in weight_layers(model).items():
        mask = find(module, Mask).mask
        assert mask.sum() == max(1, round(density * mask.numel()))
        torch.testing.assert_close(module.weight, before[name] * mask, rtol=0, atol=0)
        if not mask.all():
            assert before[name].abs()[mask].min() >= before[name].abs()[~mask].max()


def test_ties_are_broken_to_the_exact_count() -> None:
    model = nn.Linear(10, 10)
    nn.init.constant_(model.weight, -0.5)
    Prune(0.37).attach(model)
    assert (model.weight != 0).sum() == 37


def test_a_pruned_entry_is_plus_zero() -> None:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, -1.0)
    Prune(0.5).attach(model)
    assert not torch.signbit(model.weight[model.weight == 0]).any()


@pytest.mark.parametrize("shape", [(32, 32), (33, 17), (5, 3), (1, 100)])
def test_blocks(shape: tuple[int, int]) -> None:
    model = nn.Linear(shape[1], shape[0])
    Prune(0.4, granularity="block", block=(8, 4)).attach(model)
    mask = find(model, Mask).mask
    padded = torch.zeros(-(-shape[0] // 8) * 8, -(-shape[1] // 4) * 4, dtype=torch.bool)
    padded[: shape[0], : shape[1]] = mask
    blocks = padded.unflatten(0, (-1, 8)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)
    alive = blocks.any(2)
    assert alive.sum() == max(1, round(0.4 * alive.numel()))
    inside = torch.zeros_like(padded)
    inside[: shape[0], : shape[1]] = True
    whole = inside.unflatten(0, (-1, 8)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)
    assert torch.equal(blocks, whole & alive[..., None])
    assert record(model).layout == BlockSparse((8, 4))


def test_blocks_of_a_convolution_are_tiles_of_its_matrix() -> None:
    model = nn.Conv2d(6, 12, 3)
    with torch.no_grad():
        model.weight.flatten(1)[:4, :9] += 100
    Prune(1 / 18, granularity="block", block=(4, 9)).attach(model)
    mask = find(model, Mask).mask.flatten(1)
    assert mask[:4, :9].all()
    assert mask.sum() == 36


def test_lamp_ignores_the_scale_of_a_layer() -> None:
    model = network()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight *= 64.0
        scaled[5].weight /= 128.0
    for m in (model, scaled):
        Prune(0.2, scope="global", score="lamp").attach(m)
    for a, b in zip(masks(model), masks(scaled), strict=True):
        assert torch.equal(a, b)


def test_a_second_prune_goes_on_from_the_first() -> None:
    model = network()
    Prune(0.5, scope="global").attach(model)
    first = masks(copy.deepcopy(model))
    Prune(0.1, scope="global").attach(model)
    assert kept(model)[0] == round(0.1 * kept(model)[1])
    for new, old in zip(masks(model), first, strict=True):
        assert not (new & ~old).any()
        assert len(model[0].parametrizations.weight) == 1


def test_globs_choose_layers() -> None:
    model = network()
    Prune(0.5, layers="*", exclude=["0", "5"]).attach(model)
    assert [find(model[i], Mask) is not None for i in (0, 3, 5)] == [False, True, False]
    assert record(model[0]) is None
    assert record(model[3]).layout == Sparse()


@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_a_glob_that_matches_nothing(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: 'body\.\*' matches no layer; .* 0, 3, 5"):
        Prune(0.5, **{argument: "body.*"}).attach(network())
    with pytest.raises(ValueError, match="leaves no layer"):
        select(network(), "*", "*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": float("nan")}, "density must be in .* got nan"),
        ({"density": 0.5, "granularity": "row"}, "granularity must be one of .* got 'row'"),
        ({"density": 0.5, "scope": "all"}, "scope must be one of .* got 'all'"),
        ({"density": 0.5, "schedule": "slow"}, "schedule must be one of .* got 'slow'"),
        ({"density": 0.5, "block": (0, 4)}, "block must be in .* got 0"),
        ({"density": 0.5, "block": (4, 1025)}, r"block must be in \[1, 1024\], got 1025"),
        ({"density": 0.5, "hysteresis": 1.0}, "hysteresis must be in .* got 1.0"),
        ({"density": 0.5, "updates": 0}, "updates must be in .* got 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prune(**arguments)


@pytest.mark.parametrize("density", ["0.5", True, None])
def test_density_of_a_wrong_type(density: object) -> None:
    with pytest.raises(TypeError, match="density must be a number"):
        Prune(density)


def test_granularity_cannot_change() -> None:
    model = network()
    Prune(0.5).attach(model)
    with pytest.raises(ValueError, match="'0' is already pruned in blocks of one entry"):
        Prune(0.5, granularity="block").validate(model, [])


@pytest.mark.parametrize("schedule", ["cubic", "surgery"])
def test_a_schedule_needs_a_retrain(schedule: str) -> None:
    recipe = Recipe([Prune(0.5, schedule=schedule), Prune(0.2)])
    with pytest.raises(ValueError, match=r"stage 1 \(Prune\): schedule='\w+' acts during"):
        recipe.validate(network(), train_data=[0], eval_data=None, teacher=None)
    Recipe([Prune(0.5, schedule=schedule), Retrain(1)]).validate(
        network(), train_data=[0], eval_data=None, teacher=None
    )


def _drive(model: nn.Module, stage: Prune, steps: int, lr: float = 0.05) -> list[float]:
    """Some training with the schedule at work; the density after each step."""
    stage.attach(model)
    controller = stage.controller()
    controller.begin(model, 0, steps)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    densities = []
    for step in range(1, steps + 1):
        x = torch.randn(16, 3, 8, 8, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.update(model, step, steps, False)
        count, total = kept(model)
        densities.append(count / total)
    return densities


def test_cubic_schedule_follows_its_curve() -> None:
    steps, stage = 40, Prune(0.1, scope="global", schedule="cubic", updates=28, ends=0.7)
    model = network()
    densities = _drive(model, stage, steps)
    _, total = kept(model)
    for step in range(1, 29):
        wanted = 0.1 + 0.9 * (1 - step / 28) ** 3
        assert abs(densities[step - 1] - wanted) <= 1 / total
    assert densities[27:] == [round(0.1 * total) / total] * 13


def test_surgery_lets_entries_come_back_and_ends_exact() -> None:
    torch.manual_seed(0)
    stage = Prune(0.2, scope="global", schedule="surgery", updates=20, ends=0.6, hysteresis=0.05)
    model = network()
    stage.attach(model)
    first = [m.clone() for m in masks(model)]
    densities = _drive(model, stage, 50, lr=0.5)
    _, total = kept(model)
    assert densities[29:] == [round(0.2 * total) / total] * 21
    assert any((new & ~old).any() for new, old in zip(masks(model), first, strict=True))
    assert not any(find(m, Mask).recover for m in weight_layers(model).values())


def test_surgery_trains_pruned_entries_only_while_it_runs() -> None:
    model = nn.Linear(8, 8)
    stage = Prune(0.25, schedule="surgery", ends=0.5)
    stage.attach(model)
    controller = stage.controller()
    for step, trains in ((0, True), (10, False)):
        controller.begin(model, step, 20)
        model.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        gradient = model.parametrizations.weight.original.grad
        assert bool((gradient[~find(model, Mask).mask] != 0).all()) is trains


def test_masks_hold_and_travel() -> None:
    model = network()
    Prune(0.3).attach(model)
    before = [m.clone() for m in masks(model)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    fresh = network()
    Prune(0.9).attach(fresh)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    for other in (model, fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(masks(other), before, strict=True))
        assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("block", [None, (2, 3)])
def test_cubic_schedule_starts_from_what_is_alive(scope: str, block: tuple | None) -> None:
    """Also after a resume, which finds masks that are on their way already."""
    grain = {} if block is None else {"granularity": "block", "block": block}
    stage = Prune(0.1, scope=scope, schedule="cubic", updates=20, ends=1.0, **grain)
    model = network()
    Prune(0.4, scope=scope, **grain).attach(model)
    before = [m.clone() for m in masks(model)]
    stage.attach(model)
    assert all(torch.equal(a, b) for a, b in zip(masks(model), before, strict=True))
    counts = []
    for steps in (range(1, 11), range(11, 21)):
        resumed = network()
        Prune(0.7, **grain).attach(resumed)
        stage.attach(resumed)
        resumed.load_state_dict(model.state_dict())
        model, controller = resumed, stage.controller()
        controller.begin(model, steps[0] - 1, 20)
        for step in steps:
            controller.update(model, step, 20, False)
            for new, old in zip(masks(model), before, strict=True):
                assert not (new & ~old).any()
            before = [m.clone() for m in masks(model)]
            count, total = kept(model)
            counts.append(count / total)
    wanted = [0.1 + 0.3 * (1 - step / 20) ** 3 for step in range(1, 21)]
    assert counts == pytest.approx(wanted, abs=0.03 if block else 0.002)


@pytest.mark.parametrize("schedule", ["one_shot", "cubic"])
def test_a_higher_density_brings_nothing_back(schedule: str) -> None:
    model = network()
    Prune(0.2, layers=("0", "3")).attach(model)
    before = masks(copy.deepcopy(model))
    stage = Prune(0.5, schedule=schedule, layers=("0", "3"))
    if schedule == "cubic":
        _drive(model, stage, 10)
    else:
        stage.attach(model)
    assert all(torch.equal(a, b) for a, b in zip(masks(model), before, strict=True))
