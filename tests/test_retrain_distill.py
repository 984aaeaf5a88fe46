"""`Retrain` with a teacher: its losses by name, its regressors, and the same bits after a kill."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from retrain_worker import Points, images_network, network

from compressops.compress import Recipe, Retrain, cached_logits, compress
from compressops.distill import ActivationKD, AttentionMapKD, LogitsKD
from compressops.train import checkpoint, make_accelerator, progress, train

LOSSES = LogitsKD(2.0), ActivationKD("2", weight=0.5), ActivationKD("0", kind="lp")


def test_losses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    teacher = network(48).train()
    options = Retrain(epochs=2, batch_size=16, lr=0.05, distill=LOSSES, ce_weight=0.3)
    history = train(
        network(),
        Points(64),
        options,
        accelerator=make_accelerator(),
        teacher=teacher,
        console=Console(file=out, width=200),
    )
    names = ["epoch", "loss", "cross_entropy", "LogitsKD", "ActivationKD", "ActivationKD.2"]
    assert list(history[0]) == [*names, "lr", "seconds"]
    for row in history:
        weights = {"cross_entropy": 0.3, "LogitsKD": 1, "ActivationKD": 0.5, "ActivationKD.2": 1}
        total = sum(row[name] * weight for name, weight in weights.items())
        assert row["loss"] == pytest.approx(total, abs=1e-4)
    assert history[1]["ActivationKD.2"] < history[0]["ActivationKD.2"]
    assert "cross_entropy 1." in out.getvalue()
    assert "ActivationKD.2 " in out.getvalue()
    assert not any(m._forward_hooks for m in teacher.modules())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_regressors_train_along_and_are_no_part_of_the_model(optimizer: str) -> None:
    options = Retrain(steps=6, batch_size=16, lr=0.01, optimizer=optimizer, distill=LOSSES[1])
    model = network()
    result = compress(model, Recipe([options]), Points(64), teacher=network(48), log=False)
    rows = result.history[0]
    assert rows[0]["ActivationKD"] > rows[-1]["ActivationKD"]
    assert list(result.model.state_dict()) == list(model.state_dict())


def test_a_resumed_run_goes_on_with_its_regressors(tmp_path: Path) -> None:
    class Stopped(Points):
        left = 5 * 16

        def __getitem__(self, index: int):
            if Stopped.left == 0:
                raise KeyboardInterrupt
            Stopped.left -= 1
            return super().__getitem__(index)

    path = tmp_path / "c.pt"
    options = Retrain(epochs=1, batch_size=16, lr=0.05, checkpoint_seconds=0, distill=LOSSES)

    def go(dataset: Points, path: Path | None) -> tuple[dict, list]:
        model = network()
        history = train(
            model,
            dataset,
            options,
            accelerator=make_accelerator(),
            teacher=network(48),
            checkpoint=path,
        )
        return model.state_dict(), history

    # Two more samples are read for the shapes.
    Stopped.left += 2
    with pytest.raises(KeyboardInterrupt):
        go(Stopped(160), path)
    kept = checkpoint.load(path)
    assert kept["step"] == len(kept["parts"]) == 5
    assert set(kept["regressors"]) == {
        f"regressors.{i}_0.linear.{part}" for i in (1, 2) for part in ("weight", "bias")
    }
    resumed, history = go(Points(160), path)
    whole, wanted = go(Points(160), None)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    for mine, its in zip(history, wanted, strict=True):
        assert {**mine, "seconds": 0} == {**its, "seconds": 0}


def test_parts_of_a_batch_add_up() -> None:
    losses = LogitsKD(2.0), ActivationKD(("1", "3")), AttentionMapKD("1", form="mse")
    states = []
    for accumulate in (1, 3):
        model = images_network()
        options = Retrain(steps=4, batch_size=24, lr=0.05, accumulate=accumulate, distill=losses)
        history = train(
            model,
            Points(96, (2, 6, 6)),
            options,
            accelerator=make_accelerator(),
            teacher=images_network(12),
        )
        states.append((model.state_dict(), history[0]))
    for key, value in states[0][0].items():
        torch.testing.assert_close(states[1][0][key], value)
    for key in ("loss", "cross_entropy", "ActivationKD", "AttentionMapKD"):
        assert states[0][1][key] == pytest.approx(states[1][1][key], abs=2e-5)


def test_mixed_precision() -> None:
    options = Retrain(
        steps=6, batch_size=24, lr=0.02, mixed_precision="bf16", distill=(*LOSSES[:2],)
    )
    found = compress(
        network(), Recipe([options]), Points(96), teacher=network(48), log=False
    ).history[0]
    assert all(0 < found[0][name] < 10 for name in ("loss", "LogitsKD", "ActivationKD"))


def _points(samples: int = 70) -> TensorDataset:
    points = Points(samples)
    inputs, labels = zip(*(points[i] for i in range(samples)), strict=True)
    return TensorDataset(torch.stack(inputs), torch.tensor(labels))


def test_a_cached_teacher_teaches_the_same(tmp_path: Path) -> None:
    dataset, teacher, results = _points(), network(48), []
    for cache in (False, True, True):
        options = Retrain(epochs=2, batch_size=16, lr=0.05, distill=LOSSES[0], cache_teacher=cache)
        folder = tmp_path / ("cached" if cache else "plain")
        results.append(
            compress(network(), Recipe([options]), dataset, None, teacher, folder, log=False)
        )
        # The next run trains again.
        for file in folder.glob("stage-*.pt"):
            file.unlink()
    assert len(list((tmp_path / "cached").glob("logits-*.pt"))) == 1
    for result in results[1:]:
        assert result.history[0][-1]["loss"] == pytest.approx(results[0].history[0][-1]["loss"])
        for key, value in results[0].model.state_dict().items():
            torch.testing.assert_close(result.model.state_dict()[key], value)


def test_cached_logits(tmp_path: Path) -> None:
    dataset, teacher = _points(), network(48).train()
    calls = []
    teacher.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    found = cached_logits(teacher, dataset, tmp_path, batch_size=32)
    assert teacher.training
    assert calls == [32, 32, 6]
    assert torch.equal(cached_logits(teacher, dataset, tmp_path, batch_size=32), found)
    assert len(calls) == 3
    with torch.no_grad():
        torch.testing.assert_close(found, teacher.eval()(dataset.tensors[0]))
    # Another teacher, and other data, have files of their own.
    with torch.no_grad():
        teacher[0].bias.add_(1)
    assert not torch.equal(cached_logits(teacher, dataset, tmp_path), found)
    assert len(cached_logits(teacher, _points(7), tmp_path)) == 7
    files = list(tmp_path.glob("logits-*.pt"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"checkpoint .* cannot be read"):
        cached_logits(teacher, dataset, tmp_path)


def test_what_cannot_be_cached() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int):
            x, label = super().__getitem__(index)
            return x + torch.randn(()), label

    for dataset, message in (
        (Points(8), "Points has set_epoch: its samples change with the epoch"),
        (Noisy(*_points(8).tensors), "Noisy draws random numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            cached_logits(network(), dataset)
        options = Retrain(steps=1, batch_size=4, distill=LOSSES[0], cache_teacher=True)
        with pytest.raises(ValueError, match=rf"stage 1 \(Retrain\): cache_teacher: {message}"):
            compress(network(), Recipe([options]), dataset, teacher=network(), log=False)
    for arguments, message in (
        ({"distill": LOSSES}, "cache_teacher=True serves losses on logits alone"),
        ({}, "cache_teacher=True serves losses on logits alone"),
        ({"distill": LOSSES[0], "image_sizes": ((6, 1.0),)}, "needs images of one size"),
    ):
        with pytest.raises(ValueError, match=message):
            Retrain(steps=1, cache_teacher=True, **arguments)
    with pytest.raises(TypeError, match="cache_teacher must be true or false, got 1"):
        Retrain(steps=1, cache_teacher=1)
