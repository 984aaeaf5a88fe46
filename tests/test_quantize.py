"""Quantization: values on the grid, straight-through gradients, what travels with the model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from compressops.compress import Encode, Equalize, Prune, Quantize, record
from compressops.compress.activations import InputQuantizer
from compressops.compress.parametrizations import FakeQuantize, find
from compressops.compress.quantize import Refit
from compressops.compress.select import weight_layers
from compressops.compress.sizes import other_tensors, packed, sizes
from compressops.formats import (
    BlockSparse,
    Dense,
    DynamicFixedPoint,
    FixedPoint,
    Float,
    Huffman,
    Int,
    Number,
    Raw,
    Sparse,
    Ternary,
    pools,
)

NUMBERS = [
    FixedPoint(4),
    FixedPoint(6, integer_bits=-1),
    DynamicFixedPoint(4),
    DynamicFixedPoint(6, overflow=0.02),
    DynamicFixedPoint(12),
    Int(8),
    Int(4, group_size=16),
    Int(3, symmetric=False),
    Ternary(),
    Ternary("row"),
    Ternary("group", group_size=32),
    Float("bfloat16"),
    Float("float16"),
]
every_number = pytest.mark.parametrize("number", NUMBERS, ids=str)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 7, 3),
        nn.Flatten(),
        nn.Linear(7 * 16, 5),
    )


@every_number
def test_weights_are_what_the_number_writes(number: Number) -> None:
    model = network()
    dense = {n: m.weight.detach().clone() for n, m in weight_layers(model).items()}
    Quantize(number).attach(model)
    for name, module in weight_layers(model).items():
        done = record(module)
        codes = done.number.quantize(dense[name], done.params)
        assert torch.equal(module.weight, done.number.dequantize(codes, done.params))


@every_number
@pytest.mark.parametrize("layout", [Dense(), Sparse(), BlockSparse((8, 4))], ids=str)
@pytest.mark.parametrize("coding", [Raw(), Huffman()], ids=str)
def test_the_record_packs_the_very_weight(number, layout, coding) -> None:
    model = nn.Linear(50, 21)
    if isinstance(layout, Sparse):
        Prune(0.3).attach(model)
    elif isinstance(layout, BlockSparse):
        Prune(0.3, granularity="block", block=layout.block).attach(model)
    Quantize(number).attach(model)
    Encode(coding).attach(model)
    done = record(model)
    assert (type(done.layout), type(done.number), done.coding) == (
        type(layout),
        type(number),
        coding,
    )
    assert torch.equal(packed(model).unpack(), model.weight)


def test_a_fixed_point_has_one_length_for_all_layers() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight *= 40
    Quantize(FixedPoint(8)).attach(model)
    lengths = {record(m).number.integer_bits for m in weight_layers(model).values()}
    assert len(lengths) == 1
    Quantize(DynamicFixedPoint(8)).attach(model)
    assert len({int(record(m).params["integer_bits"]) for m in weight_layers(model).values()}) > 1


def test_straight_through_gradient() -> None:
    model = nn.Linear(4, 1, bias=False)
    number = FixedPoint(4, integer_bits=1)  # −1 … 0.875
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, 0.9, 5.0, -5.0]]))
    Quantize(number).attach(model)
    original = model.parametrizations.weight.original
    for sign in (1.0, -1.0):
        original.grad = None
        (sign * model.weight.sum()).backward()
        # Descent along +1 lowers the weights: that moves 5.0 back into the range and −5.0 away.
        wanted = [sign, sign if sign > 0 else 0.0, max(sign, 0.0), min(sign, 0.0)]
        assert original.grad.tolist() == [wanted]


@pytest.mark.parametrize("number", [Ternary(), Float("float16")], ids=str)
def test_gradient_without_clipping(number: Number) -> None:
    model = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        model.weight *= 100
    Quantize(number).attach(model)
    model.weight.sum().backward()
    assert torch.equal(model.parametrizations.weight.original.grad, torch.ones(3, 6))


@every_number
def test_training_lowers_the_loss_through_the_number(number: Number) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(64, 8)
    y = x.prod(1, keepdim=True).tanh()
    Quantize(number).attach(model)
    refit = Refit()
    refit.begin(model, 0, 60)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for step in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        refit.update(model, step + 1, 60, False)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for module in weight_layers(model).values():
        assert torch.equal(packed(module).unpack(), module.weight)


def test_when_parameters_are_fitted_anew() -> None:
    for refit, expected in (("never", [0, 0, 0]), ("epoch", [0, 1, 1]), ("step", [1, 1, 1])):
        model = nn.Linear(4, 4)
        Quantize(Int(8), refit=refit).attach(model)
        controller = Refit()
        controller.begin(model, 0, 3)
        quantized = find(model, FakeQuantize)
        for step, (ends, fitted) in enumerate(zip((False, True, False), expected, strict=True), 1):
            with torch.no_grad():
                model.parametrizations.weight.original.mul_(1.5)
            before = quantized.scales.clone()
            controller.update(model, step, 3, ends)
            # The last step counts as the end of an epoch.
            assert torch.equal(quantized.scales, before) is not bool(fitted), (refit, step)


def test_integer_lengths_stay_by_default() -> None:
    model = nn.Linear(4, 4)
    Quantize(DynamicFixedPoint(6)).attach(model)
    assert find(model, FakeQuantize).refit == "never"
    Quantize(Int(6)).attach(model)
    assert find(model, FakeQuantize).refit == "step"
    assert len(model.parametrizations.weight) == 1


def test_quantizing_anew_starts_from_the_trained_weight() -> None:
    model = nn.Linear(30, 30)
    twice = copy.deepcopy(model)
    Quantize(Int(8)).attach(model)
    Quantize(Int(3)).attach(twice)
    Quantize(Int(8)).attach(twice)
    assert torch.equal(model.weight, twice.weight)


@every_number
def test_travels(number: Number) -> None:
    model = network()
    Prune(0.4).attach(model)
    Quantize(number, activations=DynamicFixedPoint(8)).attach(model)
    Encode(Huffman(max_length=9)).attach(model)
    model.train()
    x = torch.randn(4, 3, 8, 8)
    model(x)
    model.eval()
    fresh = network()
    Prune(0.9).attach(fresh)
    Quantize(number, activations=DynamicFixedPoint(8)).attach(fresh)
    Encode(Huffman()).attach(fresh)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), model(x))
        for a, b in zip(weight_layers(other).values(), weight_layers(model).values(), strict=True):
            mine, its = record(a), record(b)
            assert (mine.layout, mine.number, mine.coding) == (its.layout, its.number, its.coding)
    other[0].weight = other[0].parametrizations.weight.original.detach() * -2
    assert not torch.equal(other[0].weight, model[0].weight)


def test_state_dict_is_plain_data(tmp_path) -> None:
    model = network()
    Quantize(Int(4), activations=Int(8)).attach(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize(
    "number",
    [DynamicFixedPoint(8), FixedPoint(8, 4), Int(8), Int(8, symmetric=False), Float("bfloat16")],
    ids=str,
)
def test_activations(number: Number) -> None:
    torch.manual_seed(0)
    quantizer = InputQuantizer(number)
    x = torch.randn(5, 7, 3) * 2
    assert torch.equal(quantizer.eval()(x), x)
    y = quantizer.train()(x)
    assert (y - x).abs().max() < 0.08
    assert len(y.unique()) <= 2**number.bits
    assert torch.equal(quantizer.range, torch.stack([x.min(), x.max()]))
    quantizer(2 * x)
    torch.testing.assert_close(
        quantizer.range, torch.stack([x.min(), x.max()]) * 1.1, rtol=1e-6, atol=0
    )
    frozen = quantizer.range.clone()
    leaf = x.clone().requires_grad_()
    quantizer.eval()(leaf).sum().backward()
    assert torch.equal(quantizer.range, frozen)
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_an_input_quantizer_runs_before_its_layer() -> None:
    model = nn.Linear(4, 2)
    Quantize(Int(8), activations=FixedPoint(2, 2)).attach(model)
    model.train()(torch.randn(3, 4))
    model.eval()
    x = torch.tensor([[0.4, 0.6, -5.0, 9.0]])
    assert torch.equal(model(x), model.forward(torch.tensor([[0.0, 1.0, -2.0, 1.0]])))
    assert record(model).activations is model.input_quantizer


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (Ternary(), "inputs cannot be ternary"),
        (FixedPoint(8), "needs integer_bits"),
        (Int(8, group_size=4), "group_size must be None"),
    ],
)
def test_numbers_that_inputs_cannot_have(activations: Number, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(Int(8), activations=activations)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"number must be one of DynamicFixedPoint, .* got 4"):
        Quantize(4)
    with pytest.raises(TypeError, match="coding must be one of Huffman, Raw, got 'Huffman'"):
        Encode("Huffman")
    with pytest.raises(ValueError, match=r"refit must be one of .* got 'often'"):
        Quantize(Int(4), refit="often")
    with pytest.raises(ValueError, match="one for the whole network"):
        Quantize(FixedPoint(4), refit="step")
    with pytest.raises(ValueError, match="'head' matches no layer"):
        Quantize(Int(4), layers="head").attach(network())
    with pytest.raises(ValueError, match=r"rms must be in \(0, inf\], got -1"):
        Equalize(-1)


def _trained_network() -> nn.Module:
    """Batch norms with statistics, and filters of very unequal scale."""
    model = network()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 2, 10).view(-1, 1, 1, 1)
        for _ in range(100):
            model.train()(torch.randn(16, 3, 8, 8))
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    return model.eval()


@pytest.mark.parametrize("pruned", [False, True])
def test_equalize_keeps_the_function(pruned: bool) -> None:
    model = _trained_network()
    if pruned:
        Prune(0.5).attach(model)
    x = torch.randn(8, 3, 8, 8)
    before = model.double()(x.double())
    Equalize(0.3).attach(model)
    torch.testing.assert_close(model(x.double()), before, rtol=1e-5, atol=1e-5)
    rows = model[0].weight.flatten(1)
    rows = rows[rows.any(1)]
    rms = (rows.square().sum(1) / (rows != 0).sum(1)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.3))


def test_equalize_makes_fixed_point_exact() -> None:
    """What it is for: 4 bits with one integer length, at a fraction of the error."""
    errors = []
    x = torch.randn(32, 3, 8, 8)
    for equal in (False, True):
        torch.manual_seed(1)
        model = _trained_network()
        wanted = model(x)
        if equal:
            Equalize().attach(model)
        Quantize(FixedPoint(4, overflow=0.05), layers="0").attach(model)
        errors.append((model(x) - wanted).square().mean().item())
    assert errors[1] < 0.2 * errors[0]


def test_equalize_must_come_before_quantize() -> None:
    model = _trained_network()
    Quantize(Int(4)).attach(model)
    with pytest.raises(ValueError, match="layer '0' is quantized already"):
        Equalize().validate(model, [])
    with pytest.raises(ValueError, match="'3' matches no layer; the model's layers are 0"):
        Equalize(layers="3").validate(_trained_network(), [])


def stored_raw(tensors: dict[str, torch.Tensor]) -> int:
    return pools.stored_nbytes(tensors, pools.build(tensors, Raw()))


def test_sizes() -> None:
    model = network()
    plain = sizes(model)
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert (plain.density, plain.bits, plain.ideal_rate) == (1.0, 32.0, 1.0)
    # A fresh batch norm's ones and zeros are floats of 16 bits.
    stored = stored_raw(model.state_dict())
    assert 0.95 * total < stored < total
    assert (plain.stored_bytes, plain.stored_rate) == (stored, total / stored)
    weights = {n: m.weight.numel() for n, m in weight_layers(model).items()}
    Prune(0.25, scope="global").attach(model)
    Quantize(DynamicFixedPoint(6), layers=["0", "3"]).attach(model)
    found = sizes(model)
    kept = {n: int((record(m).mask).sum()) for n, m in weight_layers(model).items()}
    ideal = 6 * (kept["0"] + kept["3"]) + 32 * kept["5"]
    assert found.ideal_rate == pytest.approx(32 * sum(weights.values()) / ideal)
    assert found.density == sum(kept.values()) / sum(weights.values())
    coded = sum(packed(m).nbytes for m in weight_layers(model).values())
    rest = other_tensors(model)
    assert sum(t.nbytes for t in rest.values()) == total - 4 * sum(weights.values())
    assert found.stored_bytes == coded + stored_raw(rest)
