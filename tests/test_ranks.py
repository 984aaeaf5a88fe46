"""Ranks that `Factorize` chooses: by budget, energy, sensitivity, and what layers see of data."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressops.compress import Factorize, search
from compressops.compress.outputs import output_error, watch
from compressops.compress.parametrizations import Factors, find
from compressops.compress.ranks import Options, Point, allocate, hull, points
from compressops.formats.decompose import Spectrum

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


def _searched(trials: int, **budget: float) -> tuple[nn.Module, float]:
    """The network with the ranks that are found, and its relative squared error."""
    pytest.importorskip("optuna")
    torch.manual_seed(0)
    model, x = network().eval(), images(16)
    exact = model(x)
    state = copy.deepcopy(model.state_dict())
    stage = Factorize(search=trials, calibration=1, **budget)
    found = stage.apply(model, [x])
    assert (found.search, found.macs, found.params) == (0, None, None)
    again = network().eval()
    again.load_state_dict(state)
    # What is kept in a checkpoint gives the same ranks, without a search.
    dataclasses.replace(found, calibration=0).attach(again)
    assert [r for r, _ in again.named_parameters()] == [r for r, _ in model.named_parameters()]
    return model, ((model(x) - exact).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"params": 0.4}])
def test_a_search_keeps_to_the_budget_and_loses_less(
    budget: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[float] = []

    def watched(*arguments: Any) -> float:
        errors.append(output_error(*arguments))
        return errors[-1]

    monkeypatch.setattr(search, "output_error", watched)
    whole = measured(network())
    (plain, before), (model, after) = _searched(1, **budget), _searched(30, **budget)
    # What is measured is what comes of it, and the best of all trials.
    assert len(errors) == 31
    assert errors[0] == pytest.approx(before, rel=1e-4)
    assert min(errors[1:]) == pytest.approx(after, rel=1e-4)
    for found in (plain, model):
        cost, given = measured(found)["params" in budget], whole["params" in budget]
        assert cost <= 0.4 * given
    # The first trial is the choice without a search.
    reference = network().eval()
    Factorize(calibration=1, **budget).apply(reference, [images(16)])
    torch.testing.assert_close(plain(images(16)), reference(images(16)))
    # It finds something in one of the two budgets; never anything worse.
    assert after < before if "macs" in budget else after <= before
    # The same again.
    assert _searched(30, **budget)[1] == after


def test_a_search_needs_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="needs the package optuna: pip install"):
        Factorize(macs=0.5, search=2, calibration=1).apply(network(), [images()])


@pytest.mark.parametrize("form", ["matrix", "spatial", "cp", "tucker"])
def test_ranks_fill_what_kernels_compute_at_once(form: str) -> None:
    found = points(form, torch.randn(40, 24, 3, 3), (1, 1))
    for point in found:
        rank = point.layout.rank
        parts = zip(rank, (40, 24), strict=True) if form == "tucker" else [(rank, 0)]
        # Tucker's end where the channels do.
        assert all(part < 16 or part % 16 == 0 or part == most for part, most in parts)
    assert len(found) > 10


def test_a_budget_of_weights_has_every_rank() -> None:
    u, v = (torch.linalg.qr(torch.randn(64, 64)).Q for _ in range(2))
    layer = nn.Linear(64, 64)
    layer.weight.data = (u * 0.9 ** torch.arange(64)) @ v

    def rank(**budget: float) -> int:
        return Factorize(**budget).apply(nn.Sequential(copy.deepcopy(layer)), ()).ranks[0][2]

    # 22 · 128 of 4096 weights.
    assert rank(params=0.7) == 22
    assert rank(macs=0.7) == 16
    assert [p.layout.rank for p in points("matrix", layer.weight, (1, 1), None, 1)] == [
        *range(1, 32)
    ]


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


def test_calibration_says_how_many_batches() -> None:
    batches, models, taken = images(6).split(2), [network() for _ in range(3)], []
    cases = zip(models, (2, 2, 3), (batches, batches[:2], batches), strict=True)
    for model, calibration, given in cases:
        one_by_one = (taken.append(calibration) or batch for batch in given)
        Factorize("matrix", rank=2, calibration=calibration).apply(model, one_by_one)
    assert taken == [2, 2, 2, 2, 3, 3, 3]
    x = images(5)
    assert torch.equal(models[0](x), models[1](x))
    assert not torch.equal(models[0](x), models[2](x))
    uncalibrated = network(), network()
    Factorize("matrix", rank=2).apply(uncalibrated[0], batches)
    Factorize("matrix", rank=2).attach(uncalibrated[1])
    assert torch.equal(uncalibrated[0](x), uncalibrated[1](x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(20, 12), (12, 20)])
def test_calibrated_layers_are_optimal(bias: bool, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).double()
    x = torch.randn(200, inputs).double() @ torch.randn(inputs, inputs).double() + 3
    model = nn.Sequential(copy.deepcopy(linear))
    Factorize(rank=4, calibration=2).apply(model, [x[:120], x[120:]])
    y = x @ linear.weight.T
    centred = y - y.mean(0) if bias else y
    best = torch.linalg.svdvals(centred)[4:].norm()
    # The sums are float32, as activations are.
    torch.testing.assert_close((model(x) - linear(x)).norm(), best, rtol=1e-3, atol=1e-6)


OPTIONS = [
    {"padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": (1, 2), "padding": "same", "padding_mode": "circular"},
    {"stride": 2, "padding": 1, "padding_mode": "reflect", "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_columns_of_a_kernel_see(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, (3, 2), **options), torch.randn(4, 3, 9, 11) + 3
    seen = watch(conv, {("", "spatial"): conv}, [x[:3], x[3]])["", "spatial"]
    # The convolution of each entry of the kernel alone gives what lies below it.
    probe, y = copy.deepcopy(conv).double(), conv(x)
    probe.bias, below = None, []
    for a in range(2):
        entries = []
        for i, row in itertools.product(range(3), range(3)):
            probe.weight.data.zero_()[0, i, row, a] = 1
            entries.append(probe(x.double())[:, 0].flatten())
        below.append(torch.stack(entries))
    patches = sum(part @ part.mT for part in below)
    torch.testing.assert_close(seen.patches, patches, rtol=1e-5, atol=1e-4)
    shifts = torch.stack([torch.stack([(p * q).sum() for q in below]) for p in below])
    torch.testing.assert_close(seen.shifts, shifts, rtol=1e-5, atol=1e-4)
    mean = sum(part.mean(1) for part in below) / 2
    torch.testing.assert_close(seen.mean(), mean, rtol=1e-4, atol=1e-5)
    assert (seen.positions, seen.samples) == (y[0, 0].numel(), 4)
    if conv.bias is not None:
        # A bias takes up the mean, which is one for all columns.
        below = [part - mean[:, None] for part in below]
        patches = sum(part @ part.mT for part in below)
        shifts = torch.stack([torch.stack([(p * q).sum() for q in below]) for p in below])
    patches = patches + patches.trace() / seen.rows * torch.eye(9)
    expected = Spectrum.of_columns(conv.weight, patches, shifts / shifts.trace())
    torch.testing.assert_close(seen.spectrum().values, expected.values, rtol=0.02, atol=1e-2)
    with pytest.raises(ValueError, match=r"layer '': calibration: .* NaN"):
        watch(conv, {("", "spatial"): conv}, [x * torch.nan])


@pytest.mark.parametrize("bias", [True, False])
def test_spatial_factors_keep_outputs(bias: bool) -> None:
    """Of images that vary in few directions, and along the columns by a factor alone."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", bias=bias).double()
    x = torch.einsum("ij,njhw->nihw", torch.randn(6, 2), torch.randn(40, 2, 6, 7)).double()
    # A mean is one more direction, unless a bias takes it up.
    x = x + 2 * bias
    exact, errors = conv(x), {}
    for calibration in (0, 1):
        model = nn.Sequential(copy.deepcopy(conv))
        Factorize("spatial", rank=6, calibration=calibration).apply(model, [x] * calibration)
        errors[calibration] = (model(x) - exact).norm()
        if bias and calibration:
            means = [y.mean((0, 2, 3)) for y in (model(x), exact)]
            torch.testing.assert_close(*means, rtol=1e-6, atol=1e-6)
    # Two channels' worth of patches: 6 directions are all that there are.
    assert errors[1] < 0.02 * exact.norm()
    assert errors[1] < 0.1 * errors[0]


def test_few_positions_leave_the_rest_to_the_weight() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 8, 3, padding=1), torch.randn(64, 16, 5, 5)
    exact, errors = conv(x), []
    for batches in ([], [x[:1]]):
        model = nn.Sequential(copy.deepcopy(conv))
        Factorize("spatial", rank=8, calibration=len(batches)).apply(model, batches)
        errors.append((model(x) - exact).norm() / exact.norm())
    # White inputs: nothing is to be learnt from them, and 25 positions teach the wrong thing.
    assert errors[1] < 1.1 * errors[0]


def test_what_is_seen_of_convolutions() -> None:
    model, x = network(), images()
    seen = watch(model[:3], {("2", "matrix"): model[2]}, [x, x[0]])["2", "matrix"]
    y = model[:3](torch.cat([x, x[:1]])).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(seen.moment, y @ y.mT, rtol=1e-4, atol=1e-4)
    assert (seen.positions, seen.samples) == (16, 17)
    with pytest.raises(ValueError, match=r"layer '2': calibration: .* NaN"):
        watch(model, {("2", "matrix"): model[2]}, [x * torch.nan])
