"""Ranks that `Factorize` chooses: by budget, energy, sensitivity, and what layers see of data."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compressops.compress import Factorize
from compressops.compress.outputs import watch
from compressops.compress.parametrizations import Factors, find
from compressops.compress.ranks import Options, Point, allocate, hull, points

sys.path.insert(0, str(Path(__file__).parent))
from test_factorize import factorized, images, network


def measured(model: nn.Module) -> tuple[float, float]:
    """Multiply-accumulates and weights of all layers, counted by hand on an 8×8 image."""
    macs = entries = 0.0
    area = {"0": 64, "2": 16, "4": 16, "6": 1, "8": 1}
    for name, positions in area.items():
        module = model.get_submodule(name)
        part, shape = find(module, Factors), tuple(module.weight.shape)
        size = module.weight.numel() if part is None else part.layout.entries(shape)
        stride = getattr(module, "stride", (1, 1))
        each = module.weight.numel() if part is None else part.layout.macs(shape, stride)
        macs, entries = macs + positions * each, entries + size
    return macs, entries


@pytest.mark.parametrize("form", ["matrix", "spatial", "auto"])
@pytest.mark.parametrize("part", [0.75, 0.5, 0.4])
@pytest.mark.parametrize("sensitivity", [False, True])
def test_budgets_are_kept(form: str, part: float, sensitivity: bool) -> None:
    whole = measured(network())
    model = network()
    stage = Factorize(form, macs=part, calibration=1, sensitivity=sensitivity)
    stage.apply(model, [images()])
    assert measured(model)[0] <= part * whole[0]
    model = network()
    Factorize(form, params=part, sensitivity=sensitivity, calibration=1).apply(model, [images()])
    assert measured(model)[1] <= part * whole[1]
    with pytest.raises(ValueError, match=r"0.001 of the macs is less than the lowest ranks take"):
        Factorize(form, macs=0.001).attach(network())


def test_energy_is_kept() -> None:
    model, before = factorized(energy=0.7), network()
    for name, module in model.named_modules():
        if find(module, Factors) is not None:
            weight = before.get_submodule(name).weight
            assert (module.weight - weight).square().sum() <= 0.3 * weight.square().sum() * 1.0001


def test_the_allocation_is_the_best_there_is() -> None:
    """Against all combinations of the ranks of three small layers."""
    torch.manual_seed(1)
    weights = [torch.randn(8, 8) @ torch.diag(torch.arange(1.0, 9) ** -p) for p in (0.2, 1, 2)]
    options = {
        str(i): Options(
            [Point(None, w.numel(), w.numel(), 0.0), *points("matrix", w, (1, 1))], scale, weight
        )
        for i, (w, scale, weight) in enumerate(
            zip(weights, (1.0, 3.0, 2.0), (1.0, 2.0, 0.5), strict=True)
        )
    }

    def total(chosen) -> tuple[float, float]:
        return (
            sum(p.macs * options[n].positions for n, p in chosen.items()),
            sum(p.error * options[n].sensitivity for n, p in chosen.items()),
        )

    for part in (0.8, 0.6, 0.45):
        chosen = allocate(options, "macs", part)
        cost, error = total(chosen)
        assert cost <= part * 64 * 6
        for a in options["0"].points:
            for b in options["1"].points:
                for c in options["2"].points:
                    other = total({"0": a, "1": b, "2": c})
                    assert other[0] > cost or other[1] >= error - 1e-12
    ordered = hull(options["1"].points, "macs")
    assert ordered[0].layout is None
    assert all(a.macs > b.macs and a.error < b.error for a, b in itertools.pairwise(ordered))


def test_calibration_keeps_outputs_and_not_weights() -> None:
    x, errors = images(64), {}
    exact = network()(x)
    for calibration in (0, 1):
        model = network()
        stage = Factorize(macs=0.4, calibration=calibration)
        stage.apply(model, [x] if calibration else [])
        errors[calibration] = (model(x) - exact).norm()
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(20, 12), (12, 20)])
def test_calibrated_layers_are_optimal(bias: bool, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).double()
    x = torch.randn(200, inputs).double() @ torch.randn(inputs, inputs).double() + 3
    model = nn.Sequential(copy.deepcopy(linear))
    Factorize(rank=4, calibration=1).apply(model, [x[:120], x[120:]])
    y = x @ linear.weight.T
    centred = y - y.mean(0) if bias else y
    best = torch.linalg.svdvals(centred)[4:].norm()
    # The sums are float32, as activations are.
    torch.testing.assert_close((model(x) - linear(x)).norm(), best, rtol=1e-3, atol=1e-6)


def test_what_is_seen_of_convolutions() -> None:
    model, x = network(), images()
    seen = watch(model[:3], {"2": model[2]}, [x, x[0]])["2"]
    y = model[:3](torch.cat([x, x[:1]])).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(seen.moment, y @ y.mT, rtol=1e-4, atol=1e-4)
    assert (seen.positions, seen.samples) == (16, 17)
    with pytest.raises(ValueError, match=r"layer '2': calibration: .* NaN"):
        watch(model, {"2": model[2]}, [x * torch.nan])
