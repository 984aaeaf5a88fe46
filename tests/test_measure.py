"""measure: times of layers' variants, each in its place in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressops.measure import times_in_place


def test_times_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)).train()
    again = nn.Sequential(model, model[0])
    calls: list[str] = []

    def variant(label: str, layer: nn.Module) -> Callable:
        return lambda x: (calls.append(label), layer(x))[1]

    plain = copy.deepcopy(model)
    variants = {
        name: [variant(f"{name}a", plain[int(name)]), variant(f"{name}b", plain[int(name)])]
        for name in ("0", "2")
    }
    layers = {"0": model[0], "2": model[2]}
    times = times_in_place(again, layers, variants, torch.randn(2, 4), rounds=3)
    # All layers run their first variant, then all their second; the first round does not count.
    assert calls == ["0a", "2a", "0a", "0b", "2b", "0b"] * 6
    assert {name: [len(t) for t in found] for name, found in times.items()} == {
        "0": [5, 5],
        "2": [5, 5],
    }
    assert all(t > 0 for found in times.values() for seconds in found for t in seconds)
    assert model.training
    assert "forward" not in vars(model[0])


def test_times_in_place_leaves_the_model_as_it_was_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).train()
    mine = model[0].forward = lambda x: x + 1

    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        times_in_place(model, {"0": model[0]}, {"0": [fails]}, torch.randn(2, 4))
    assert model[0].forward is mine
    assert model.training
