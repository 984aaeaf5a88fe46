"""The retraining loop: what it computes, that a kill loses nothing, and that it can be shared."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import random
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import retrain_worker
from retrain_worker import Points, compress_images, images_network, network

from compressops.compress import Prune, Quantize, Retrain
from compressops.compress.quantize import Refit
from compressops.compress.select import weight_layers
from compressops.distill import LogitsKD
from compressops.formats import FixedPoint, Int
from compressops.train import checkpoint, data, evaluate, make_accelerator, train
from compressops.train.optim import build_optimizer, learning_rate

# The whole of what is promised is 20; a few of them keep the suite short.
KILLS = int(os.environ.get("COMPRESSOPS_TEST_KILLS", "5"))


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
    class Sized(Points):
        sizes: list[int]

        def set_size(self, size: int) -> None:
            self.sizes.append((size, 0))

        def __getitem__(self, index: int):
            size, count = self.sizes[-1]
            self.sizes[-1] = (size, count + 1)
            return super().__getitem__(index)

    dataset = Sized(96)
    dataset.sizes = []
    options = Retrain(steps=8, batch_size=16, image_sizes=((24, 0.5), (28, 0.25), (32, 0.25)))
    train(network(), dataset, options, accelerator=make_accelerator())
    # The second epoch begins at step 7, within the last size.
    assert dataset.sizes == [(24, 64), (28, 32), (32, 32)]


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
    with pytest.raises(TypeError, match=r"distill must be a list of losses \(LogitsKD\), got 'KD'"):
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


def _same(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key


def test_killed_at_random_points_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    # A server that has imported everything forks the runs, so that most of their time is work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retrain_worker", "accelerate", "torch._dynamo"])
    workdir, out = tmp_path / "work", tmp_path / "killed.pt"

    def start(folder: Path, file: Path, pause: float) -> multiprocessing.Process:
        process = context.Process(
            target=retrain_worker.compress_tiny, args=(str(folder), str(file), pause)
        )
        process.start()
        return process

    start(tmp_path / "warm", tmp_path / "warm.pt", 0.0).join()
    began = time.monotonic()
    reference = start(tmp_path / "reference", tmp_path / "reference.pt", 0.001)
    reference.join()
    whole = time.monotonic() - began
    assert reference.exitcode == 0
    chance = random.Random(time.time_ns())
    places, kills = set(), 0
    while kills < KILLS:
        if out.exists():
            workdir, out = tmp_path / f"work{kills}", tmp_path / f"killed{kills}.pt"
        process = start(workdir, out, 0.001)
        # Short of a whole run, so that several kills hit one; some hit the start, and some the end.
        process.join(timeout=chance.uniform(0, 0.6 * whole))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            for path in workdir.glob("*.partial.pt"):
                places.add((path.name, checkpoint.load(path)["step"]))
        else:
            assert process.exitcode == 0
    if not out.exists():
        start(workdir, out, 0.0).join()
    intact = torch.load(tmp_path / "reference.pt")
    for file in tmp_path.glob("killed*.pt"):
        killed = torch.load(file)
        _same(killed["model"], intact["model"])
        for mine, its in zip(killed["history"], intact["history"], strict=True):
            assert [row["loss"] for row in mine] == [row["loss"] for row in its]
    assert out.exists()
    assert not list(tmp_path.glob("work*/*.partial.pt"))
    print(f"{kills} kills, {len(places)} places within a stage to go on from")


def test_resuming_skips_what_was_done(tmp_path: Path) -> None:
    """A checkpoint in the middle of an epoch, by its time; the data before it is not read again."""
    seen: list[int] = []

    class Watched(Points):
        def __getitem__(self, index: int):
            seen.append(index)
            if len(seen) == 5 * 16 + 1:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    path = tmp_path / "c.pt"
    options = Retrain(epochs=1, batch_size=16, lr=0.05, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train(network(), Watched(160), options, accelerator=make_accelerator(), checkpoint=path)
    assert checkpoint.load(path)["step"] == 5
    resumed, whole = network(), network()
    train(resumed, Watched(160), options, accelerator=make_accelerator(), checkpoint=path)
    assert sorted(seen[:80] + seen[81:]) == list(range(160))
    train(whole, Points(160), options, accelerator=make_accelerator())
    _same(resumed.state_dict(), whole.state_dict())


def test_checkpoints_are_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"value": 1})

    def broken(*args, **kwargs):
        args[1].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"value": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        checkpoint.load(path)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    out = tmp_path / "two"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_port", str(random.randrange(20000, 40000))),
            *(retrain_worker.__file__, str(out)),
        ],
        check=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    first, second = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    _same(first["model"], second["model"])
    one = compress_images()
    assert len(list(Path(f"{out}.work").glob("stage-*.pt"))) == 5
    for key, value in one.model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(first["model"][key], value, rtol=1e-3, atol=1e-4)
        elif isinstance(value, torch.Tensor):
            assert (first["model"][key] == value).float().mean() > 0.99
    for mine, its in zip(first["rows"], one.table, strict=True):
        assert mine == pytest.approx((its.top1, its.top5), abs=2)


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


def test_int_scales_follow_the_weights() -> None:
    model = network()
    Quantize(Int(4)).attach(model)
    run(model, epochs=1, lr=0.3, controllers=[Refit()])
    for module in weight_layers(model).values():
        original = module.parametrizations.weight.original.detach()
        quantized = module.parametrizations.weight[0]
        assert torch.equal(quantized.scales, Int(4).fit(original)["scales"])
