"""`Retrain` with a teacher: its losses by name, its regressors, and the same bits after a kill."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from retrain_worker import Points, images_network, network

from compressops.compress import Recipe, Retrain, compress
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
    found = compress(model, Recipe([options]), Points(64), teacher=network(48), log=False).history[
        0
    ]
    assert found[0]["ActivationKD"] > found[-1]["ActivationKD"]
    result = compress(model, Recipe([options]), Points(64), teacher=network(48), log=False)
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
