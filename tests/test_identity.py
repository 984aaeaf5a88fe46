"""What checkpoints are named by: a run goes on only from its own model, data and precision."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from retrain_worker import Points, Sized, network

from compressops.compress import Prune, Recipe, Retrain, compress
from compressops.compress.identity import data_key


def _finished(tmp_path: Path, model: nn.Module | None = None, **data) -> str:
    """What a run says that may go on from what is in the folder."""
    console = Console(record=True, width=300, file=open("/dev/null", "w"))  # noqa: SIM115
    stages = [Prune(0.5), Retrain(steps=2, batch_size=8)]
    given = {"train_data": Points(40), "eval_data": Points(40), **data}
    compress(model or network(), Recipe(stages), workdir=tmp_path, log=console, **given)
    return console.export_text()


def test_checkpoints_are_of_the_very_data(tmp_path: Path) -> None:
    """Data sets of one type and length, with other contents, share nothing."""

    def tensors(scale: float) -> TensorDataset:
        return TensorDataset(scale * torch.ones(40, 12), torch.arange(40) % 6)

    class Shifted(Points):
        def __init__(self, shift: float) -> None:
            super().__init__(40)
            self.shift = shift

        def __getitem__(self, index: int):
            x, y = super().__getitem__(index)
            return x + self.shift + torch.rand(1), y

    whole = tensors(1.0)
    pairs = [
        (tensors(1.0), tensors(2.0)),
        (Subset(Points(80), range(40)), Subset(Points(80), range(1, 41))),
        (Shifted(0.0), Shifted(0.5)),
    ]
    whole.tensors[0][17, 3] += 1e-3
    pairs.append((tensors(1.0), whole))
    for i, (one, other) in enumerate(pairs):
        for name in ("train_data", "eval_data"):
            folder = tmp_path / f"{i}{name}"
            assert "are taken from" not in _finished(folder, **{name: one})
            assert "stages 1 to 2 are taken from" in _finished(folder, **{name: one})
            assert "are taken from" not in _finished(folder, **{name: other})


def test_data_that_is_never_the_same_says_so(tmp_path: Path) -> None:
    class Wild(Points):
        generator = torch.Generator()

        def __getitem__(self, index: int):
            x, y = super().__getitem__(index)
            return x + torch.rand(1, generator=self.generator), y

    text = _finished(tmp_path, train_data=Wild(40))
    assert "train_data: " in text
    assert "is known by its type and length alone (item 0 differs when it is read twice)" in text
    assert "stages 1 to 2 are taken from" in _finished(tmp_path, train_data=Wild(40))


def test_naming_data_leaves_it_and_the_generators_alone() -> None:
    dataset = Points(40)
    dataset.set_epoch(3, 5)
    before, state = dataset.seed, torch.get_rng_state()
    data_key(dataset)
    assert dataset.seed == before
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpoints_are_of_the_very_model(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        factor = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * super().forward(x)

    def model(factor: float) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(12, 12), Scaled(12, 6))
        layers[1].factor = factor
        return layers

    _finished(tmp_path, model(1.0))
    assert "stages 1 to 2 are taken from" in _finished(tmp_path, model(1.0))
    assert "are taken from" not in _finished(tmp_path, model(2.0))


def test_checkpoints_are_of_the_precision_that_was_used(tmp_path: Path, monkeypatch) -> None:
    _finished(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "stages 1 to 1 are taken from" in _finished(tmp_path)


def test_every_stage_trains_at_its_own_size(tmp_path: Path) -> None:
    """Also after a resume; and the data set of the caller is what it was."""
    stages = [
        Retrain(steps=4, batch_size=8, image_sizes=((4, 1.0),)),
        Retrain(steps=2, batch_size=8),
    ]
    dataset = Sized(40)
    options = {"train_data": dataset, "eval_data": Points(40), "log": False}
    whole = compress(network(), Recipe(stages), **options)
    assert dataset.size == 12
    compress(network(), Recipe(stages[:1]), workdir=tmp_path, **options)
    resumed = compress(network(), Recipe(stages), workdir=tmp_path, **options)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row.top1 for row in whole.table] == [row.top1 for row in resumed.table]
