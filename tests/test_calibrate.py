"""Calibration: ranges of activations, scales of weights, GPTQ, and convert() with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import Tied, compressed, correlated

from compressops import Calibrate
from compressops.calibrate import Range, fit_mse, run
from compressops.calibrate.ranges import SAMPLE
from compressops.compress import Prune, Quantize
from compressops.convert import convert
from compressops.formats import Huffman, Int, Ternary
from compressops.nn import Int4Linear, Int8Linear, PackedLinear
from compressops.serialize import load, save

INT4 = Int(bits=4, group_size=64)


# Ranges of activations.


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_is_exact_over_pieces(symmetric: bool) -> None:
    pieces = [torch.randn(3, 70) + 0.5, torch.randn(0, 70), torch.randn(5, 2, 70) * 3]
    range_ = Range(sample=False)
    for piece in pieces:
        range_.add(piece)
    x = torch.cat([piece.flatten() for piece in pieces])
    scale, zero = range_.quantization(Calibrate(activations="minmax", symmetric=symmetric))
    if symmetric:
        assert zero is None
        assert scale == pytest.approx(float(x.abs().max()) / 127)
    else:
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        assert scale == pytest.approx((high - low) / 255)
        assert zero == round(-128 - low / scale)


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (-2.0, -0.5), (0.0, 0.0), (-1.0, 3e38)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_zero_is_exact_and_scales_are_positive(
    low: float, high: float, symmetric: bool, method: str
) -> None:
    range_ = Range()
    range_.add(torch.tensor([low, high]))
    scale, zero = range_.quantization(Calibrate(activations=method, symmetric=symmetric))
    assert 0 < scale < float("inf")
    assert zero is None or -128 <= zero <= 127


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_are_those_of_all_values(symmetric: bool) -> None:
    x = torch.randn(3, SAMPLE) + 1.0
    x[:2] += 4.0
    range_ = Range()
    for piece in (x[2, : SAMPLE // 2], x[:2], x[2, SAMPLE // 2 :]):
        range_.add(piece)
    config = Calibrate(activations="percentile", percentile=99.0, symmetric=symmetric)
    scale, zero = range_.quantization(config)
    low, high = -128 - (zero or 0), 127 - (zero or 0)
    inside = (x >= (low - 0.5) * scale) & (x <= (high + 0.5) * scale)
    assert inside.float().mean().item() == pytest.approx(0.99, abs=0.004)
    # The sample is a uniform one of all pieces, and the same each time.
    assert len(range_._values) == SAMPLE
    assert float(range_._values.mean()) == pytest.approx(float(x.mean()), abs=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_ranges_have_less_error_where_there_are_outliers(symmetric: bool) -> None:
    x = torch.randn(4096)
    x[7] = 60.0
    errors = {}
    for method in ("minmax", "percentile", "mse"):
        range_ = Range()
        range_.add(x)
        config = Calibrate(activations=method, symmetric=symmetric, percentile=99.99)
        scale, zero = range_.quantization(config)
        shift = zero or 0
        values = ((torch.round(x / scale) + shift).clamp(-128, 127) - shift) * scale
        errors[method] = float((values - x).square().sum())
    assert errors["mse"] <= errors["minmax"]
    assert errors["mse"] <= errors["percentile"]


# Scales of weights.


@pytest.mark.parametrize(
    "number", [Int(2), Int(3, 16), Int(4, 24, False), Int(8), Int(2, None, False)]
)
@pytest.mark.parametrize("shape", [(9, 70), (5, 3, 4, 4), (3, 1), (0, 8), (4, 0)], ids=str)
def test_fit_mse_is_never_worse_in_any_group(number: Int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.rand(shape)

    def errors(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return number.by_group((number.fake_quantize(weight, params) - weight).square()).sum(2)

    params = fit_mse(number, weight)
    number.check_params(params, shape)
    assert (errors(params) <= errors(number.fit(weight))).all()
    if number.bits == 2 and shape == (9, 70) and number.symmetric:
        assert errors(params).sum() < 0.8 * errors(number.fit(weight)).sum()


# convert().


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ).eval()


DATA = [correlated(256, 64, seed) / 30 for seed in range(3)]


def error_of(packed: nn.Module, model: nn.Module) -> float:
    x = correlated(256, 64, seed=9) / 30
    with torch.no_grad():
        return float((packed(x) - model(x)).norm() / model(x).norm())


def test_gptq_lowers_the_error_of_a_trained_model() -> None:
    model = net().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    target = torch.randn(64, 10) / 8
    for step in range(60):
        x = correlated(256, 64, 100 + step) / 30
        loss = F.mse_loss(model(x), torch.tanh(x @ target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    nearest, compensated = (
        error_of(convert(model, INT4, prefer="size", calibration=c), model)
        for c in (None, Calibrate(DATA, weights="gptq"))
    )
    assert compensated < 0.8 * nearest


def test_gptq_becomes_ordinary_packed_integers(tmp_path: Path) -> None:
    model, calibration = net(), Calibrate(iter(DATA), weights="gptq", activation_order=True)
    before = [p.clone() for p in model.parameters()]
    packed = convert(model, (INT4, Huffman()), calibration=calibration, prefer="size")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [type(m) for m in packed[::2]] == [Int4Linear] * 3
    why = packed.conversion_notes["2"].why
    assert "weights by gptq: output error" in why
    assert "on 768 inputs" in why
    save(packed, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", net())
    assert torch.equal(again(DATA[0]), packed(DATA[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [INT4, Int(bits=8, symmetric=False)], ids=str)
def test_gptq_in_half_precision(dtype: torch.dtype, number: Int) -> None:
    model, data = net().to(dtype), [DATA[0].to(dtype)]
    packed = convert(model, number, calibration=Calibrate(data, weights="gptq"), prefer="size")
    assert packed[0].weight.dtype == dtype
    assert packed[0].packed_weight.packed().dtype == dtype
    assert (packed(data[0]) - model(data[0])).norm() < 0.2 * model(data[0]).norm()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_static_activations(method: str, symmetric: bool, tmp_path: Path) -> None:
    model = net()
    calibration = Calibrate(DATA, activations=method, symmetric=symmetric)
    packed = convert(model, Int(bits=8), calibration=calibration, prefer="size")
    for layer in packed[::2]:
        assert type(layer) is Int8Linear
        assert (layer.static, layer.x_zero is None) == (True, symmetric)
    if method == "minmax":
        with torch.no_grad():
            seen = torch.cat([model[:2](x) for x in DATA])
        if symmetric:
            torch.testing.assert_close(packed[2].x_scale, seen.max() / 127)
        else:
            torch.testing.assert_close(packed[2].x_scale, seen.max() / 255)
            assert packed[2].x_zero == -128
    assert f"activations static by {method}" in packed.conversion_notes["2"].why
    assert error_of(packed, model) < 0.05
    save(packed, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", net())
    assert torch.equal(again(DATA[0]), packed(DATA[0]))


def test_example_inputs_are_the_data_where_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressops.rivals.median_times", lambda functions: [1.0, 2.0])
    calibration = Calibrate(activations="minmax")
    packed = convert(net(), Int(bits=8), calibration=calibration, example_inputs=DATA[0])
    assert packed[0].x_scale == DATA[0].abs().max() / 127


def test_dynamic_asymmetric_activations_need_no_data() -> None:
    model = net()
    packed = convert(model, Int(bits=8), calibration=Calibrate(symmetric=False), prefer="size")
    assert (packed[0].static, packed[0].symmetric) == (False, False)
    assert error_of(packed, model) < 0.02


def test_weights_by_mse_everywhere() -> None:
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 8))
    number = Int(bits=3, group_size=32)
    for weights, fit in (("mse", fit_mse), ("minmax", Int.fit)):
        packed = convert(model, number, calibration=Calibrate(weights=weights), prefer="size")
        for layer, dense in zip(packed, model, strict=True):
            weight = dense.weight.detach()
            assert torch.equal(layer.weight, number.fake_quantize(weight, fit(number, weight)))
        assert f"weights by {weights}" in packed.conversion_notes["0"].why


def test_layers_that_share_a_weight_share_the_result() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    packed = convert(Twice(), INT4, calibration=Calibrate(DATA, weights="gptq"), prefer="size")
    assert packed.a.packed_weight is packed.b.packed_weight
    assert "on 1536 inputs" in packed.conversion_notes["b"].why
    # With an embedding in between, no Hessian speaks for all.
    tokens = [torch.arange(40)[None]]
    packed = convert(Tied(), Int(bits=4), calibration=Calibrate(tokens, weights="gptq"))
    assert packed.head.packed_weight is packed.embedding.packed_weight
    assert "weights by mse" in packed.conversion_notes["head"].why
    # It is called twice, and both calls count.
    assert "weights by gptq" in packed.conversion_notes["block"].why
    assert "on 80 inputs" in packed.conversion_notes["block"].why


def test_hessians_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calibration = net(), Calibrate(DATA, weights="gptq")
    whole = convert(model, INT4, calibration=calibration, prefer="size")
    monkeypatch.setattr(run, "HESSIAN_BYTES", 4 * 128 * 128)
    parts = convert(model, INT4, calibration=calibration, prefer="size")
    assert torch.equal(parts(DATA[0]), whole(DATA[0]))
    layers = {
        str(i): run.Layer(m, INT4, None, linear=True, static=False, weight=i)
        for i, m in enumerate(model[::2])
    }
    sharing = {i: [str(i)] for i in range(3)}
    assert list(run._parts(layers, sharing)) == [{i: [str(i)]} for i in range(3)]


def test_what_the_data_never_reach_is_said() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    calibration = Calibrate(DATA, weights="gptq", activations="minmax")
    packed = convert(Unused(), Int(bits=8), calibration=calibration, prefer="size")
    why = packed.conversion_notes["unused"].why
    assert "not by gptq: the calibration data never reach it" in why
    assert "activations stay dynamic" in why
    assert (packed.used.static, packed.unused.static) == (True, False)


def test_static_activations_that_a_layer_has_no_place_for_are_said() -> None:
    calibration = Calibrate(DATA, activations="minmax")
    packed = convert(net(), {"0": INT4, "2": Int(bits=8)}, calibration=calibration, prefer="size")
    assert "int4_linear" in packed.conversion_notes["0"].why
    assert packed[2].static


def test_trained_integers_stay_and_pruned_entries_stay_zero() -> None:
    model = compressed(net(), Quantize(Int(bits=8)))
    calibration = Calibrate(DATA, weights="gptq", activations="minmax")
    packed = convert(model, Int(bits=8), calibration=calibration, prefer="size")
    assert torch.equal(packed[0].weight, model[0].weight)
    assert packed[0].static
    assert "weights by" not in packed.conversion_notes["0"].why
    model = compressed(net(), Prune(density=0.5))
    packed = convert(model, INT4, calibration=Calibrate(DATA, weights="gptq"), prefer="size")
    assert not packed[0].weight[model[0].weight == 0].any()
    assert "weights by gptq" in packed.conversion_notes["0"].why
    assert packed[0].packed_weight.packed().density == pytest.approx(0.5, abs=0.01)


def test_fallbacks_to_the_dense_kernel_keep_calibrated_weights() -> None:
    model = net()
    number = Int(bits=4, group_size=24)
    packed = convert(model, number, calibration=Calibrate(DATA, weights="gptq"))
    assert type(packed[0]) is PackedLinear
    assert error_of(packed, model) < error_of(convert(model, number), model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Calibrate(weights="awq"), ValueError, "minmax, mse, gptq, got 'awq'"),
        (lambda: Calibrate(activations="max"), ValueError, "percentile, mse, got 'max'"),
        (lambda: Calibrate(percentile=50), ValueError, "percentile .*got 50"),
        (lambda: Calibrate(percentile=101), ValueError, "percentile .*got 101"),
        (lambda: Calibrate(damping=0), ValueError, "damping .*got 0"),
        (lambda: Calibrate(block_size=0), ValueError, "block_size .*got 0"),
        (lambda: Calibrate(symmetric=None), ValueError, "symmetric .*got None"),
        (lambda: Calibrate(torch.ones(3)), TypeError, "iterable of batches.*got a Tensor"),
        (lambda: Calibrate(7), TypeError, "got a int"),
        (
            lambda: convert(net(), INT4, calibration=Calibrate(weights="gptq")),
            ValueError,
            "weights='gptq' with activations='dynamic' needs data .*got none",
        ),
        (
            lambda: convert(net(), Int(8), calibration=Calibrate([], activations="mse")),
            ValueError,
            "got no batch",
        ),
        (
            lambda: convert(net(), Ternary(), calibration=Calibrate()),
            ValueError,
            "no layer gets integers",
        ),
        (
            lambda: convert(net(), INT4, calibration="gptq"),
            TypeError,
            "a Calibrate or None, got 'g",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "options", [{"weights": "gptq"}, {"activations": "minmax"}, {"activations": "mse"}], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_name_the_layer(options: dict, value: float) -> None:
    bad = DATA[0].clone()
    bad[3, 5] = value
    model = net()
    with pytest.raises(ValueError, match=r"layer '0': calibration: .* holds 1 that are NaN"):
        convert(model, Int(bits=8), calibration=Calibrate([DATA[0], bad], **options))
    assert not any(m._forward_pre_hooks for m in model.modules())
