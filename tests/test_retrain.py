"""The retraining loop: what it computes, that a kill loses nothing, and that it can be shared."""

from __future__ import annotations

import builtins
import random
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from retrain_worker import Points, Sized, images_network, network

from compressops.compress import Prune, Quantize, Retrain
from compressops.compress.quantize import Refit
from compressops.compress.select import weight_layers
from compressops.distill import LogitsKD
from compressops.formats import FixedPoint, Int
from compressops.train import checkpoint, data, evaluate, make_accelerator, train
from compressops.train.optim import build_optimizer, learning_rate


def run(model: nn.Module, samples: int = 96, **options) -> list[dict[str, float]]:
    controllers = options.pop("controllers", ())
    teacher = options.pop("teacher", None)
    path = options.pop("checkpoint", None)
    options = Retrain(**{"batch_size": 16, "lr": 0.05, **options})
    return train(
        model,
        Points(samples),
        options,
        accelerator=make_accelerator(options.mixed_precision),
        controllers=controllers,
        teacher=teacher,
        checkpoint=path,
    )


def accuracy(model: nn.Module) -> float:
    return evaluate(model, Points(120)).top1


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("sgd", "cosine"), ("adamw", "linear"), ("muon", "constant")]
)
def test_it_learns(optimizer: str, schedule: str) -> None:
    model = network()
    history = run(model, epochs=4, optimizer=optimizer, schedule=schedule, warmup=0.1, lr=0.03)
    assert [round(row["epoch"]) for row in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert accuracy(model) > 50
    assert not model.training
    assert "forward" not in vars(model), "Accelerate's wrapper is still there"


def test_options_of_the_loss() -> None:
    """Each of them changes what is learnt; the teacher learns nothing."""
    teacher = network()
    run(teacher, epochs=3)
    kept = {k: v.clone() for k, v in teacher.state_dict().items()}
    found = []
    for options in (
        {},
        {"label_smoothing": 0.1},
        {"distill": LogitsKD(2.0)},
        {"distill": LogitsKD(2.0), "ce_weight": 0.0},
        {"clip_grad_norm": 0.5},
        {"ema": 0.9},
        {"weight_decay": 0.01},
        {"mixed_precision": "bf16"},
    ):
        model = network()
        run(model, epochs=1, teacher=teacher, **options)
        found.append(model[0].weight.detach().clone())
        assert found[-1].dtype == torch.float32
        assert all(not torch.equal(found[-1], other) for other in found[:-1])
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())


def test_parts_of_a_batch_add_up() -> None:
    models = [images_network() for _ in range(3)]
    for model, accumulate in zip(models, (1, 2, 5), strict=True):
        train(
            model,
            Points(96, (2, 6, 6)),
            Retrain(steps=6, batch_size=24, lr=0.05, accumulate=accumulate),
            accelerator=make_accelerator(),
        )
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_was_done_to_the_weights_holds() -> None:
    model = network()
    Prune(0.3).attach(model)
    Quantize(FixedPoint(4)).attach(model)
    masks = [m.weight == 0 for m in weight_layers(model).values()]
    codes = [m.weight.detach().clone() for m in weight_layers(model).values()]
    run(model, epochs=2, lr=0.2, controllers=[Refit()])
    changed = False
    for module, zero, before in zip(weight_layers(model).values(), masks, codes, strict=True):
        mask = module.parametrizations.weight[0].mask
        number = module.parametrizations.weight[1].number
        assert not module.weight[~mask].any()
        scaled = module.weight * 2.0 ** (4 - number.integer_bits)
        assert torch.equal(scaled, scaled.round())
        changed |= not torch.equal(module.weight, before)
        assert zero.any()
    assert changed


def test_a_loss_that_is_nan_stops_at_its_step(tmp_path: Path) -> None:
    class Broken(Points):
        def __getitem__(self, index: int):
            x, y = super().__getitem__(index)
            return (x * float("nan") if index == 40 else x), y

    model, path = network(), tmp_path / "c.pt"
    options = Retrain(epochs=1, batch_size=8, checkpoint_seconds=0)
    order = data.plan(
        Broken(64),
        **{"epochs": 1, "steps": None, "batch_size": 8, "image_sizes": ()},
        **{"world": 1, "accumulate": 1, "seed": 0},
    ).batches(0, 0, 8, 0, 1, 1)
    step = next(i for i, batch in enumerate(order, 1) if 40 in batch)
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {step} of 8"):
        train(model, Broken(64), options, accelerator=make_accelerator(), checkpoint=path)
    if step > 1:
        state = checkpoint.load(path)
        assert state["step"] == step - 1
        assert all(v.isfinite().all() for v in state["model"].values())


def test_image_sizes_change_during_the_run() -> None:
    class Counting(Sized):
        def __init__(self) -> None:
            super().__init__(96)
            self.sizes: list[tuple[int, int]] = []

        def set_size(self, size: int) -> None:
            super().set_size(size)
            self.sizes.append((size, 0))

        def __getitem__(self, index: int):
            size, count = self.sizes[-1]
            self.sizes[-1] = (size, count + 1)
            return super().__getitem__(index)

    dataset = Counting()
    options = Retrain(steps=8, batch_size=16, image_sizes=((4, 0.5), (8, 0.25), (10, 0.25)))
    train(network(), dataset, options, accelerator=make_accelerator())
    # The second epoch begins at step 7, within the last size; then it is as it was.
    assert dataset.sizes == [(4, 64), (8, 32), (10, 32), (12, 0)]


def test_a_run_that_fails_leaves_the_image_size_as_it_was() -> None:
    class Broken(Sized):
        def __getitem__(self, index: int):
            raise OSError("no such image")

    dataset = Broken(96)
    options = Retrain(steps=8, batch_size=16, image_sizes=((4, 1.0),))
    with pytest.raises(OSError, match="no such image"):
        train(network(), dataset, options, accelerator=make_accelerator())
    assert dataset.size == 12


@pytest.mark.parametrize("source", ["torch", "numpy", "random"])
def test_random_augmentation_is_a_function_of_seed_epoch_and_step(source: str) -> None:
    """Whichever generator it draws from, and in however many workers."""
    draw = {
        "torch": lambda: torch.rand(1).item(),
        "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
        "random": random.random,
    }[source]

    class Random(Points):
        def __getitem__(self, index: int):
            x, y = super().__getitem__(index)
            return x + draw(), y

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen = nn.Linear(12, 6), []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            return self.linear(x)

    seen = []
    for workers in (0, 2):
        model = Recording()
        # The noise of Points is that of its seed, so only what is drawn differs by epoch.
        dataset = Random(32)
        dataset.set_epoch = lambda epoch, seed: None
        options = Retrain(epochs=2, batch_size=16, workers=workers)
        train(model, dataset, options, accelerator=make_accelerator())
        seen.append(torch.cat(model.seen))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    shifts = (seen[0][:, 0] - seen[0][:, 1]).sort().values
    plain = torch.stack([Points(32)[i][0] for i in range(32)])
    known = (plain[:, 0] - plain[:, 1]).sort().values.repeat_interleave(2)
    torch.testing.assert_close(shifts, known)  # Each sample came twice, …
    first, second = seen[0][:32].sum(1).sort().values, seen[0][32:].sum(1).sort().values
    assert not torch.isclose(first, second).any()  # … with another shift.


def test_every_epoch_sees_each_sample_once_in_another_order() -> None:
    plan = data.Plan(samples=50, batch_size=10, total_steps=15, image_sizes=(), seed=3)
    seen = []
    for epoch, size, first, end in plan.segments(0):
        assert size is None
        batches = plan.batches(epoch, first, end, 0, 1, 1)
        seen.append(list(chain(*batches)))
        assert sorted(seen[-1]) == list(range(50))
        shares = [plan.batches(epoch, first, end, rank, 2, 1) for rank in (0, 1)]
        for whole, *parts in zip(batches, *shares, strict=True):
            assert list(chain(*parts)) == whole
    assert len(seen) == 3
    assert seen[0] != seen[1] != seen[2]
    resumed = [plan.batches(*segment[0:1], *segment[2:], 0, 1, 1) for segment in plan.segments(7)]
    every = [plan.batches(*segment[0:1], *segment[2:], 0, 1, 1) for segment in plan.segments(0)]
    assert list(chain(*resumed)) == list(chain(*every))[7:]


def test_learning_rates() -> None:
    for schedule in ("cosine", "linear", "constant"):
        rates = [learning_rate(schedule, 0.2, step, 50) for step in range(50)]
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(rates) == 1.0
        assert all(rate > 0 for rate in rates)
        assert sorted(rates[10:], reverse=True) == rates[10:]


def test_muon_is_blind_to_the_scale_of_a_matrix() -> None:
    steps = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(2, 2))
        with torch.no_grad():
            model[0].weight *= scale
        before = model[0].weight.detach().clone()
        optimizer = build_optimizer(
            model, "muon", lr=0.1, other_lr=None, momentum=0.9, weight_decay=0.0
        )
        for p in model.parameters():
            p.grad = torch.ones_like(p) / scale
        optimizer.step()
        steps.append((model[0].weight.detach() - before) / scale)
    torch.testing.assert_close(*steps)


def test_data_of_other_forms() -> None:
    class Dicts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> dict:
            return {"a": torch.ones(3) * index, "b": torch.ones(3), "labels": index % 2}

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict:
            class Output:
                logits = self.linear(a + b)

            return Output()

    model = Add()
    options = Retrain(steps=2, batch_size=8, workers=1)
    assert train(model, Dicts(), options, accelerator=make_accelerator())
    assert evaluate(model, Dicts()).top5 == 100
    with pytest.raises(TypeError, match=r"a batch must be \(inputs, labels\).*got Tensor"):
        train(model, [torch.ones(3)] * 8, options, accelerator=make_accelerator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give epochs or steps, not both: got epochs=None, steps=None"),
        ({"epochs": 1, "steps": 1}, "not both: got epochs=1, steps=1"),
        ({"epochs": 0}, r"epochs must be in \(0, inf\], got 0"),
        ({"epochs": 1, "optimizer": "adam"}, "optimizer must be one of .*, got 'adam'"),
        ({"epochs": 1, "lr": -0.1}, r"lr must be in \(0, inf\], got -0.1"),
        ({"epochs": 1, "other_lr": 0.1}, "other_lr goes with optimizer='muon', not 'sgd'"),
        ({"epochs": 1, "batch_size": 0}, r"batch_size must be in \[1, .*, got 0"),
        ({"epochs": 1, "warmup": 2}, r"warmup must be in \[0, 1\], got 2"),
        ({"epochs": 1, "ema": 1}, r"ema must be in \[0, 1\), got 1"),
        ({"epochs": 1, "mixed_precision": "int8"}, "mixed_precision must be one of .*'int8'"),
        ({"epochs": 1, "image_sizes": ((24, 0.5),)}, "must add up to 1"),
        ({"epochs": 1, "image_sizes": ((0, 1.0),)}, r"size must be in \[1, .*, got 0"),
        ({"epochs": 1, "ce_weight": 0}, "leaves nothing to train on"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retrain(**arguments)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"distill must be a list of losses .*LogitsKD\), got 'KD'"):
        Retrain(1, distill="KD")
    with pytest.raises(TypeError, match=r"image_sizes must be a list of \[size, part\] pairs, got"):
        Retrain(1, image_sizes=(24, 32))
    with pytest.raises(ValueError, match="distill needs a teacher"):
        run(network(), steps=1, distill=LogitsKD())
    with pytest.raises(ValueError, match="accumulate=17 is more than the 16 samples"):
        run(network(), steps=1, accumulate=17)


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def missing(name: str, *args, **kwargs):
        if name.split(".")[0] == "accelerate":
            raise ModuleNotFoundError("No module named 'accelerate'")
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"needs the package accelerate: pip install 'compres"):
        make_accelerator()


def test_a_batch_must_fit_the_processes() -> None:
    arguments = {"epochs": 1, "steps": None, "image_sizes": (), "accumulate": 1, "seed": 0}
    with pytest.raises(ValueError, match="batch_size=9 is not a multiple of the 2 processes"):
        data.plan(Points(30), batch_size=9, world=2, **arguments)


def test_evaluation_counts() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x.long(), 10).float()

    # The prediction is the input; the label is right for 7 of 11.
    pairs = [(torch.tensor(float(i % 10)), i % 10 if i < 7 else 9 - i % 10) for i in range(11)]
    found = evaluate(Fixed(), pairs, batch_size=4)
    assert found.top1 == pytest.approx(100 * 7 / 11)
    assert found.samples == 11
    assert evaluate(nn.Linear(12, 6).train(), Points(20)).top5 <= 100


def test_evaluation_leaves_every_module_in_its_mode() -> None:
    model = network().train()
    model[1].eval()
    before = [m.training for m in model.modules()]
    evaluate(model, Points(20))
    assert [m.training for m in model.modules()] == before
    with pytest.raises(RuntimeError):
        evaluate(model, Points(20, (7,)))
    assert [m.training for m in model.modules()] == before


def test_int_scales_follow_the_weights() -> None:
    model = network()
    Quantize(Int(4)).attach(model)
    run(model, epochs=1, lr=0.3, controllers=[Refit()])
    for module in weight_layers(model).values():
        original = module.parametrizations.weight.original.detach()
        quantized = module.parametrizations.weight[0]
        assert torch.equal(quantized.scales, Int(4).fit(original)["scales"])
