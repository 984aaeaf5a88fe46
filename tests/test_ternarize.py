"""Ternary weights: scales against brute force, LAT in training, and layers that run as trained."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compressops as co
from compressops.compress import Quantize, record
from compressops.compress.activations import RowQuantizer
from compressops.compress.parametrizations import FakeQuantize, find
from compressops.compress.quantize import Refit
from compressops.formats import Int, Ternary
from compressops.formats.ternary import nearest_scales
from compressops.train import make_accelerator

NEAREST = Ternary(threshold=None)


def error(x: torch.Tensor, d: torch.Tensor, alpha: float, b: torch.Tensor) -> float:
    return float((d.double() * (x.double() - alpha * b).square()).sum())


def brute_force(x: torch.Tensor, d: torch.Tensor) -> float:
    """The least error over every choice of codes, with the best α ≥ 0 for each."""
    best = float("inf")
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=len(x)):
        b = torch.tensor(signs, dtype=torch.float64)
        weight = float((d.double() * b.square()).sum())
        alpha = max(0.0, float((d.double() * b * x.double()).sum()) / weight) if weight else 0.0
        best = min(best, error(x, d, alpha, b))
    return best


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-4, 4, width=32), st.floats(0, 3, width=32)), min_size=1, max_size=6
    )
)
def test_exact_scales_are_the_optimum(entries) -> None:
    x, d = (torch.tensor(column, dtype=torch.float32) for column in zip(*entries, strict=True))
    params = NEAREST.fit(x, d)
    codes = NEAREST.quantize(x, params)
    found, least = error(x, d, float(params["scales"]), codes), brute_force(x, d)
    assert found <= least * (1 + 1e-5) + 1e-5 * float((d * x * x).sum())


def test_every_row_and_group_has_its_optimum() -> None:
    torch.manual_seed(0)
    weight, d = torch.randn(3, 7), torch.rand(3, 7)
    for number, parts in (
        (Ternary("row", threshold=None), [(slice(None),)]),
        (Ternary("group", 4, threshold=None), [(slice(0, 4),), (slice(4, 7),)]),
    ):
        scales = number.fit(weight, d)["scales"]
        for i in range(3):
            for j, (part,) in enumerate(parts):
                x, c = weight[i, part], d[i, part]
                alone = NEAREST.fit(x, c)["scales"]
                torch.testing.assert_close(scales[i, j], alone[0, 0], rtol=1e-6, atol=0)
                codes = NEAREST.quantize(x, {"scales": alone})
                assert error(x, c, float(alone), codes) <= brute_force(x, c) * (1 + 1e-5)


def test_alternation_ends_in_a_fixed_point_no_worse_than_its_start() -> None:
    torch.manual_seed(1)
    x, d = torch.randn(40, 64).abs().double(), torch.rand(40, 64).double()
    start = x.mean(1)
    alpha = nearest_scales(x, d, start)
    large = x > alpha[:, None] / 2
    torch.testing.assert_close(alpha, (d * x * large).sum(1) / (d * large).sum(1))

    def errors(scale: torch.Tensor) -> torch.Tensor:
        b = x > scale[:, None] / 2
        return (d * (x - scale[:, None] * b).square()).sum(1)

    assert (errors(alpha) <= errors(start) * (1 + 1e-6)).all()
    assert (errors(nearest_scales(x, d)) <= errors(alpha) * (1 + 1e-6)).all()
    # From the optimum it stays there.
    torch.testing.assert_close(nearest_scales(x, d, nearest_scales(x, d)), nearest_scales(x, d))


def test_degenerate_weights() -> None:
    assert NEAREST.fit(torch.zeros(3, 4))["scales"].tolist() == [[0.0]]
    assert NEAREST.fit(torch.ones(3, 4), torch.zeros(3, 4))["scales"].tolist() == [[0.0]]
    assert NEAREST.fit(torch.zeros(0, 4))["scales"].tolist() == [[0.0]]
    assert Ternary("row", threshold=None).fit(torch.zeros(2, 0))["scales"].shape == (2, 0)
    assert nearest_scales(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"curvature .* shape, got \[2\]"):
        NEAREST.fit(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="threshold=None"):
        Ternary().fit(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        NEAREST.fit(torch.tensor([1.0, float("nan")]))


def test_less_error_than_the_threshold_of_twn() -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 256)
    errors = []
    for number in (Ternary("row"), Ternary("row", threshold=None)):
        written = number.fake_quantize(weight, number.fit(weight))
        errors.append(float((written - weight).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("solver", ["exact", "alternating"])
def test_loss_aware_scales_follow_adam(solver: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    number = Ternary("row", threshold=None)
    Quantize(number, loss_aware=True, solver=solver).attach(model)
    quantized, original = find(model, FakeQuantize), model.parametrizations.weight.original
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    refit = Refit()
    refit.begin(model, 0, 3, optimizer)
    x = torch.randn(32, 16) * torch.logspace(-1, 1, 16)
    for step in range(1, 4):
        before = quantized.scales.clone()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        refit.update(model, step, 3, False)
        d = optimizer.state[original]["exp_avg_sq"].sqrt()
        start = before if solver == "alternating" else None
        wanted = number.fit(original.detach(), d, start)["scales"]
        assert torch.equal(quantized.scales, wanted)
        assert not torch.equal(wanted, number.fit(original.detach())["scales"])


def test_loss_aware_with_another_optimizer_is_an_error() -> None:
    model = nn.Linear(4, 4)
    Quantize(NEAREST, loss_aware=True).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    refit = Refit()
    for other, name in ((optimizer, "SGD"), (None, "NoneType")):
        refit.begin(model, 0, 1, other)
        with pytest.raises(ValueError, match=f"Adam's second moments, got {name}"):
            refit.update(model, 1, 1, True)


def test_loss_aware_needs_adam_and_a_number_without_threshold() -> None:
    with pytest.raises(ValueError, match=r"threshold=None\), got Ternary"):
        Quantize(Ternary(), loss_aware=True)
    with pytest.raises(ValueError, match=r"threshold=None\), got Int"):
        Quantize(Int(4), solver="alternating")
    stage = Quantize(NEAREST, loss_aware=True)
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        stage.validate(nn.Linear(3, 3), [co.Retrain(steps=1)])
    stage.validate(nn.Linear(3, 3), [co.Retrain(steps=1, optimizer="adamw")])
    with pytest.raises(ValueError, match=r"ranges='rows' needs activations=Int"):
        Quantize(Int(8), ranges="rows")
    with pytest.raises(ValueError, match="ranges"):
        Quantize(Int(8), activations=Int(8), ranges="columns")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_rounded_to_their_own_range(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 7, 33) * torch.logspace(-3, 3, 5)[:, None, None]).requires_grad_()
    y = RowQuantizer(Int(bits, symmetric=symmetric))(x)
    spans = x.abs().amax(-1) * 2 if symmetric else x.amax(-1) - x.amin(-1)
    steps = spans / (2**bits - 2 if symmetric else 2**bits - 1)
    assert ((y - x).abs() <= steps[..., None] * 0.51).all()
    assert max(len(row.unique()) for row in y.reshape(-1, 33)) <= 2**bits
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


CASES = {
    "ternary": (Ternary("row", threshold=None), Int(8), "TernaryLinear"),
    "twn": (Ternary(), Int(8), "TernaryLinear"),
    "int8": (Int(8), Int(8), "Int8Linear"),
    "int8 asymmetric": (Int(8), Int(8, symmetric=False), "Int8Linear"),
    "int4": (Int(4, group_size=16), Int(8), "Int4Linear"),
}


@pytest.mark.parametrize(("number", "inputs", "name"), CASES.values(), ids=CASES)
def test_converts_to_the_layer_that_it_was_trained_for(number, inputs, name, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 10))
    Quantize(number, activations=inputs, ranges="rows").attach(model)
    model.eval()
    packed = co.convert(model, prefer="size")
    assert [type(packed[i]).__name__ for i in (0, 2)] == [name, name]
    assert packed[0].input_quantizer is None
    x = torch.randn(9, 48)
    trained, run = model(x), packed(x)
    # The second layer's input may land on another code where the first one's rounding differs.
    torch.testing.assert_close(packed[:2](x), model[:2](x), rtol=1e-5, atol=1e-5)
    assert (trained - run).abs().max() < 0.02 * trained.abs().max()
    co.save(packed, tmp_path / "model.safetensors")
    again = co.load(
        tmp_path / "model.safetensors",
        nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 10)),
    )
    assert torch.equal(again.eval()(x), run)


def test_other_inputs_stay_quantized_by_the_module(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 10))
    Quantize(Ternary("row"), activations=Int(4), ranges="rows").attach(model)
    model.eval()
    packed = co.convert(model, prefer="size")
    assert type(packed[0]).__name__ == "PackedLinear"
    x = torch.randn(9, 48)
    torch.testing.assert_close(packed(x), model(x))
    co.save(packed, tmp_path / "model.safetensors")
    again = co.load(
        tmp_path / "model.safetensors", nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 10))
    )
    assert isinstance(again[0].input_quantizer, RowQuantizer)
    assert torch.equal(again.eval()(x), packed(x))
    assert record(model[0]).activations is model[0].input_quantizer


def test_loss_aware_training_by_recipe(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 24)
    data = torch.utils.data.TensorDataset(x, (x[:, :2].prod(1) > 0).long())
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 2))
    recipe = co.Recipe(
        [
            co.Quantize(
                Ternary("row", threshold=None), activations=Int(8), ranges="rows", loss_aware=True
            ),
            co.Retrain(epochs=8, optimizer="adamw", lr=0.01, batch_size=32),
        ]
    )
    assert co.Recipe.from_yaml(recipe.to_yaml()) == recipe
    make_accelerator()
    result = co.compress(model, recipe, train_data=data, eval_data=data, workdir=tmp_path)
    rows = result.table.rows
    assert rows[-1].top1 > rows[1].top1
    packed = co.convert(result.model)
    assert (packed(x).argmax(1) == result.model(x).argmax(1)).float().mean() > 0.98
