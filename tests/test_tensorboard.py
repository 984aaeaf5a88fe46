"""Curves for TensorBoard: what is written, once, by killed runs too."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from retrain_worker import Points, network

from compressops.compress import Prune, Recipe, Retrain, compress
from compressops.distill import LogitsKD
from compressops.train import make_accelerator, train
from compressops.train.optim import learning_rate


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_losses_by_name_learning_rate_and_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    retrain = Retrain(epochs=2, batch_size=16, lr=0.05, warmup=0.3, distill=LogitsKD(2.0))
    result = compress(
        network(),
        Recipe([Prune(0.5), retrain]),
        Points(64),
        Points(30),
        network(48),
        tmp_path / "work",
        log=False,
        tensorboard=tmp_path / "logs",
    )
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["stage-02-Retrain", "stages"]
    found = _scalars(tmp_path / "logs" / "stage-02-Retrain")
    assert set(found) == {"loss/loss", "loss/cross_entropy", "loss/LogitsKD", "lr"}
    for values in found.values():
        assert [step for step, _ in values] == list(range(1, 9))
    for name in ("loss", "cross_entropy", "LogitsKD"):
        for epoch, row in enumerate(result.history[1]):
            values = [value for _, value in found[f"loss/{name}"][4 * epoch : 4 * epoch + 4]]
            assert sum(values) / 4 == pytest.approx(row[name], abs=1e-5)
    expected = [0.05 * learning_rate("cosine", 0.3, step, 8) for step in range(8)]
    assert [value for _, value in found["lr"]] == pytest.approx(expected)
    # What is restored is drawn as well, in any folder.
    compress(
        network(),
        Recipe([Prune(0.5), retrain]),
        Points(64),
        Points(30),
        network(48),
        tmp_path / "work",
        log=False,
        tensorboard=str(tmp_path / "again"),
    )
    for folder in ("logs", "again"):
        found = _scalars(tmp_path / folder / "stages")
        for tag in ("top1", "top5"):
            expected = [(i, getattr(row, tag)) for i, row in enumerate(result.table)]
            assert found[f"accuracy/{tag}"] == [(i, pytest.approx(x)) for i, x in expected]
        assert found["stored_bytes"][-1] == (2, result.table[-1].stored_bytes)


def test_a_run_that_goes_on_draws_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Stopped(Points):
        left = 5 * 16

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if Stopped.left == 0:
                raise KeyboardInterrupt
            Stopped.left -= 1
            return super().__getitem__(index)

    def go(dataset: Points, name: str, seconds: float) -> dict:
        options = Retrain(epochs=2, batch_size=16, lr=0.05, checkpoint_seconds=seconds)
        logs = {"checkpoint": tmp_path / f"{name}.pt", "tensorboard": tmp_path / name}
        train(network(), dataset, options, accelerator=make_accelerator(), **logs)
        return _scalars(tmp_path / name)

    # The last checkpoint is of step 4, the end of an epoch; step 5 was drawn.
    with pytest.raises(KeyboardInterrupt):
        go(Stopped(64), "stopped", 1e9)
    assert [step for step, _ in _scalars(tmp_path / "stopped")["lr"]] == [1, 2, 3, 4, 5]
    assert go(Points(64), "stopped", 1e9) == go(Points(64), "whole", 1e9)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "tensorboard":
            raise ImportError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    logs = tmp_path / "logs"
    message = f"tensorboard='{logs}' needs the package tensorboard: pip install"
    with pytest.raises(ImportError, match=message):
        compress(network(), Recipe([Prune(0.5)]), log=False, tensorboard=logs)
    with pytest.raises(ImportError, match=message):
        train(
            network(),
            Points(16),
            Retrain(steps=1, batch_size=16),
            accelerator=make_accelerator(),
            tensorboard=logs,
        )
    with pytest.raises(TypeError, match="tensorboard must be a folder, got True"):
        compress(network(), Recipe([Prune(0.5)]), log=False, tensorboard=True)
    assert not logs.exists()
