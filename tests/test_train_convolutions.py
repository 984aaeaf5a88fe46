"""Training with convolutions in the Winograd domain: the same gradients, nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import compressops as co
from compressops.nn import WinogradConv2d
from compressops.train.convolutions import winograd_convolutions


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),  # too few channels
        nn.Conv2d(16, 32, 3, padding="same", bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2),  # strided
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 16, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(),
    )


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_are_those_of_direct_convolution() -> None:
    model, x = net().double(), torch.randn(2, 3, 21, 18)
    exact = gradients(model, x.double())
    model = model.float()
    with winograd_convolutions(model, None) as names:
        assert names == ["1", "4"]
        ours = gradients(model, x)
    for ours_, exact_ in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            ours_.double(), exact_, rtol=1e-3, atol=1e-4 * exact_.abs().max()
        )


def test_it_is_winograd_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from compressops.train import convolutions

    monkeypatch.setattr(
        convolutions, "winograd_conv2d", lambda *args, **kwargs: calls.append(1) or args[0]
    )
    model = nn.Conv2d(16, 16, 3, padding=1)
    with winograd_convolutions(model):
        model(torch.randn(1, 16, 8, 8))
        assert len(calls) == 1
        model(torch.randn(1, 16, 3, 3))  # smaller than a tile
        model(torch.randn(16, 8, 8))  # unbatched
        model.double()(torch.randn(1, 16, 8, 8, dtype=torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            model.float()(torch.randn(1, 16, 8, 8))
        assert len(calls) == 1
    model(torch.randn(1, 16, 8, 8))
    assert len(calls) == 1


def test_classes_that_convolve_in_their_own_way_go_on_so() -> None:
    class Normalized(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.norm(), bias)

    model = nn.Sequential(Normalized(16, 16, 3), WinogradConv2d(16, 16, 3, aware=True))
    torch.nn.utils.parametrize.register_parametrization(
        model.append(nn.Conv2d(16, 16, 3))[2], "weight", nn.Tanh()
    )
    with winograd_convolutions(model) as names:
        assert names == ["2"]


def test_modules_are_as_before_also_after_an_error() -> None:
    model = net()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="mine"), winograd_convolutions(model, model):
        raise RuntimeError("mine")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    copy.deepcopy(model)


def test_retrain_takes_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 12, 12))
    data = torch.utils.data.TensorDataset(torch.randn(16, 3, 12, 12), torch.arange(16) % 4)
    results = []
    for convolutions in ("direct", "winograd"):
        recipe = co.Recipe(
            [co.Prune(density=0.5), co.Retrain(steps=3, batch_size=8, convolutions=convolutions)]
        )
        result = co.compress(copy.deepcopy(model), recipe, train_data=data)
        results.append(result.model[1].weight.detach())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    assert not torch.equal(*results)


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match=r"convolutions.*'fft'"):
        co.Retrain(steps=1, convolutions="fft")
