"""The stage `Factorize`: training of factors, files, and what chains onto them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import compressops as co
from compressops.compress import Encode, Factorize, Prune, Quantize, Recipe, Retrain, record
from compressops.compress.parametrizations import Factors, Mask, find
from compressops.compress.select import select, weight_layers
from compressops.compress.sizes import sizes
from compressops.formats import Dense, DynamicFixedPoint, FixedPoint, Float, Huffman, Int, LowRank
from compressops.nn import LowRankConv2d, LowRankLinear, PackedConv2d


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.Conv2d(24, 20, 1),
        nn.Flatten(),
        nn.Linear(320, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    ).eval()


def images(count: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), 8, mode="bilinear")


def factorized(**arguments) -> nn.Sequential:
    model = network()
    Factorize(**arguments).attach(model)
    return model


STAGES = [
    {"rank": 4},
    {"rank": 3, "form": "spatial"},
    {"energy": 0.6},
    {"macs": 0.5},
    {"params": 0.4, "form": "auto"},
    {"ranks": (("2", "spatial", 8), ("6", "matrix", 5))},
]


@pytest.mark.parametrize("arguments", STAGES, ids=str)
def test_convert_keeps_the_function_and_save_the_model(arguments, tmp_path) -> None:
    model = factorized(**arguments)
    x = images()
    expected = model(x)
    for prefer in ("speed", "size"):
        new = co.convert(model, prefer=prefer)
        torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-5)
        assert any(isinstance(m, (LowRankConv2d, LowRankLinear)) for m in new)
    size = co.save(new, tmp_path / "net.safetensors")
    again = co.load(tmp_path / "net.safetensors", network())
    assert torch.equal(again(x), new(x))
    assert co.verify(tmp_path / "net.safetensors").file_bytes == size
    # Header and manifest apart, the file has the size that was promised.
    assert 0 < size - sizes(model).stored_bytes < 4000
    str(co.report(model))
    table = str(co.report(new))
    assert "low_rank" in table
    assert "No layer runs a faster kernel" not in table


@pytest.mark.parametrize("arguments", STAGES, ids=str)
def test_no_layer_gets_larger_or_dearer(arguments) -> None:
    model, before = factorized(**arguments), network()
    found = 0
    for name, module in before.named_modules():
        part = find(model.get_submodule(name), Factors) if hasattr(module, "weight") else None
        if part is None:
            continue
        found += 1
        shape, stride = tuple(module.weight.shape), getattr(module, "stride", (1, 1))
        assert part.layout.macs(shape, stride) < module.weight.numel()
        assert part.layout.entries(shape) < module.weight.numel()
    assert found
    with pytest.raises(ValueError, match=r"no selected layer .* gets smaller by it"):
        factorized(rank=300)


CHAINS = [
    (Quantize(Int(bits=8)), Encode(Huffman())),
    (Prune(density=0.4), Quantize(DynamicFixedPoint(bits=6)), Encode(Huffman())),
    (Prune(density=0.5, layers="*.v"), Quantize(Int(4, group_size=8), layers="6")),
    (Quantize(FixedPoint(bits=6)),),
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_the_axes_chain(chain, residency: str, tmp_path) -> None:
    model, x = factorized(rank=5), images()
    dense = sizes(model).stored_bytes
    for stage in chain:
        stage.attach(model)
    assert sizes(model).stored_bytes < dense
    new = co.convert(model, residency=residency, prefer="size")
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)
    for name, module in new.named_modules():
        if isinstance(module, (LowRankConv2d, LowRankLinear)):
            part = find(model.get_submodule(name), Factors)
            for factor, held in zip(
                part.factors(), module.packed_weight.packed().factors(), strict=True
            ):
                assert torch.equal(factor.weight.detach(), held.unpack())
                done = record(factor)
                assert held.number == (done.number if done else Float("float32"))
    size = co.save(new, tmp_path / "net.safetensors")
    assert torch.equal(co.load(tmp_path / "net.safetensors", network(), residency)(x), new(x))
    assert 0 < size - sizes(model).stored_bytes < 4000
    figures = co.report(new).totals, co.report(model).totals
    assert figures[0].ideal == pytest.approx(figures[1].ideal)


def test_the_config_quantizes_factors_after_training() -> None:
    model, x = factorized(rank=5), images()
    new = co.convert(model, (Int(bits=8), Huffman()))
    packed = new[6].packed_weight.packed()
    assert {factor.number for factor in packed.factors()} == {Int(bits=8)}
    assert packed.coding == Huffman()
    assert (new(x) - model(x)).norm() < 0.05 * model(x).norm()
    with pytest.raises(ValueError, match=r"layer '0': it was factorized to .* would multiply"):
        co.convert(model, Dense())


def test_measured_slower_runs_dense(monkeypatch) -> None:
    model, x = factorized(rank=5), images()
    monkeypatch.setattr(
        "compressops.rivals.median_times", lambda calls: [*range(len(calls), 0, -1)]
    )
    new = co.convert(model, example_inputs=x)
    assert not any(isinstance(m, (LowRankConv2d, LowRankLinear)) for m in new)
    assert isinstance(new[2], PackedConv2d)
    assert new[2].packed_weight.packed().layout == LowRank(5)
    assert "LowRankConv2d not used: measured" in new.conversion_notes["2"].why
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)
    # Measuring leaves the model as it is.
    assert find(model[2], Factors) is not None
    model(x)


def test_gradients_are_those_of_the_factors() -> None:
    model = nn.Sequential(nn.Linear(9, 7, bias=False)).double()
    Factorize(rank=2).attach(model)
    u, v = (factor.weight for factor in find(model[0], Factors).factors())
    x = torch.randn(4, 9).double()
    torch.autograd.gradcheck(lambda a, b: F.linear(x, a @ b), (u, v))
    loss = model(x).square().sum()
    loss.backward()
    a, b = u.detach().requires_grad_(), v.detach().requires_grad_()
    expected = torch.autograd.grad((x @ b.T @ a.T).square().sum(), (a, b))
    torch.testing.assert_close((u.grad, v.grad), expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"0.parametrizations.weight.0.{name}.weight" for name in "uv"
    ]


def test_copies_pickles_and_states() -> None:
    model, x = factorized(rank=4), images()
    Prune(density=0.5).attach(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        assert find(find(again[6], Factors).u, Mask) is not None
    other = factorized(rank=4)
    Prune(density=0.5).attach(other)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    low = network()
    Factorize(rank=3).attach(low)
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|does not fit"):
        low.load_state_dict(factorized(rank=4).state_dict())


def test_a_new_weight_is_factorized() -> None:
    model = factorized(rank=4)
    value = torch.randn(40, 320)
    model[6].weight = value
    u, sigma, vt = torch.linalg.svd(value, full_matrices=False)
    best = (u[:, :4] * sigma[:4]) @ vt[:4]
    torch.testing.assert_close(model[6].weight, best, rtol=1e-3, atol=1e-4)


def test_tied_layers_share_factors() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    Factorize(rank=4).attach(model)
    assert find(model[0], Factors) is find(model[2], Factors)
    assert list(weight_layers(model)) == ["0.u", "0.v"]
    new = co.convert(model)
    assert new[0].packed_weight is new[2].packed_weight
    x = torch.randn(3, 32)
    torch.testing.assert_close(new(x), model(x))


def test_names_of_factors() -> None:
    model = factorized(rank=4)
    names = set(weight_layers(model))
    assert {"6.u", "6.v"} <= names
    assert "6" not in names
    assert set(select(model, "6")) == {"6.u", "6.v"}
    assert set(select(model, "*.u")) == {n for n in names if n.endswith(".u")}
    assert set(select(model, "*", "6.v")) == names - {"6.v"}
    with pytest.raises(ValueError, match=r"layer '6.u' cannot be factorized: it is a factor"):
        Factorize(rank=2, layers="6.u").attach(model)
    with pytest.raises(ValueError, match=r"'6.u' is a factor, whose input is no layer's"):
        Quantize(Int(bits=8), layers="6", activations=Int(bits=8)).validate(model, [])


def task() -> tuple[TensorDataset, TensorDataset]:
    teacher, x = network(), images(256)
    with torch.no_grad():
        labels = teacher(x).argmax(1)
    return TensorDataset(x[:192], labels[:192]), TensorDataset(x[192:], labels[192:])


def test_a_recipe_retrains_factors_and_resumes(tmp_path) -> None:
    train, held = task()
    recipe = Recipe(
        [
            Retrain(steps=2, batch_size=32),
            Factorize(macs=0.3, calibration=1, sensitivity=True),
            Retrain(steps=30, batch_size=32, lr=0.05),
            Quantize(Int(bits=8)),
            Encode(Huffman()),
        ]
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    result = co.compress(network(), recipe, train, held, workdir=tmp_path, log=False)
    before, after = result.table[2], result.table[3]
    assert before.density < 1
    assert after.density == before.density
    assert after.top1 > before.top1
    assert result.table[5].stored_bytes < before.stored_bytes / 3
    # From every stage on: the last checkpoints are lost, one after the other.
    for number in range(5, 1, -1):
        for path in tmp_path.glob(f"stage-{number:02d}-*.pt"):
            path.unlink()
        again = co.compress(network(), recipe, train, held, workdir=tmp_path, log=False)
        for key, value in result.model.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, again.model.state_dict()[key]), key


def test_retraining_moves_the_factors() -> None:
    train, held = task()
    stages = [Factorize(rank=3), Retrain(steps=3, batch_size=32, lr=0.05)]
    moved = co.compress(network(), Recipe(stages), train, held, log=False).model
    start = factorized(rank=3)
    for factor, before in zip(
        find(moved[6], Factors).factors(), find(start[6], Factors).factors(), strict=True
    ):
        assert not torch.equal(factor.weight, before.weight)
    assert torch.linalg.matrix_rank(moved[6].weight) == 3


@pytest.mark.parametrize("form", ["tucker", "cp"])
def test_tensor_forms(form: str, tmp_path) -> None:
    pytest.importorskip("tensorly")
    x = images()
    for arguments in ({"rank": (6, 5) if form == "tucker" else 8}, {"macs": 0.5}, {"params": 0.5}):
        model = factorized(form=form, **arguments)
        forms = {n: f.layout.form for n, m in model.named_modules() if (f := find(m, Factors))}
        assert forms == {n: "matrix" if n in "468" else form for n in forms}
        assert "6" in forms
        Quantize(Int(bits=8)).attach(model)
        new = co.convert(model)
        torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)
        co.save(new, tmp_path / "net.safetensors")
        assert torch.equal(co.load(tmp_path / "net.safetensors", network())(x), new(x))
    if form == "tucker":
        kept = factorized(form="tucker", energy=0.5, layers="2")
        weight = network()[2].weight
        assert (kept[2].weight - weight).square().sum() <= 0.5 * weight.square().sum()


ERRORS = [
    ({}, "give one of rank, ranks, energy, macs, params: got none"),
    ({"rank": 2, "macs": 0.5}, "got rank, macs"),
    ({"rank": 0}, "rank must be an integer from 1"),
    ({"rank": 2, "form": "svd"}, "form must be one of .* got 'svd'"),
    ({"rank": 2, "form": "auto"}, "name the form"),
    ({"macs": 0.0}, r"macs must be in \(0, 1\], got 0.0"),
    ({"params": 1.5}, r"params must be in \(0, 1\], got 1.5"),
    ({"energy": "a"}, r"energy must be a number .* got 'a'"),
    ({"energy": 0.5, "form": "cp"}, "'cp' has no singular values"),
    ({"macs": 0.5, "sensitivity": True}, "needs calibration batches, got calibration=0"),
    ({"rank": 2, "sensitivity": True, "calibration": 1}, "weighs a budget"),
    ({"macs": 0.5, "search": 3}, "search=3 needs calibration batches, got calibration=0"),
    ({"energy": 0.5, "search": 3, "calibration": 1}, "search=3 weighs a budget"),
    ({"macs": 0.5, "form": "cp", "search": 3}, "'cp' has no singular values"),
    ({"macs": 0.5, "search": -1}, "search must be in .* got -1"),
    ({"macs": 0.5, "calibration": -1}, "calibration must be in .* got -1"),
    ({"ranks": (("a", "matrix"),)}, r"ranks must be a list of \[glob, form, rank\]"),
    ({"rank": 2, "layers": 3}, "layers must be a string or a list of strings, got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=str)
def test_wrong_arguments(arguments, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Factorize(**arguments)


def test_wrong_models() -> None:
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Linear(64, 64))
    Factorize(rank=2).attach(grouped)
    assert list(weight_layers(grouped)) == ["0", "1.u", "1.v"]
    with pytest.raises(ValueError, match="layer '0' cannot be factorized: it has 2 groups"):
        Factorize(rank=2, layers="0").attach(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)))
    with pytest.raises(ValueError, match="leaves none that can be factorized: 'a': only Linear"):
        Factorize(rank=2).attach(nn.ModuleDict({"a": nn.Embedding(40, 40)}))
    pruned = network()
    Prune(density=0.5).attach(pruned)
    with pytest.raises(
        ValueError, match="layer '0' cannot be factorized: it was compressed before"
    ):
        Factorize(rank=2).attach(pruned)
    with pytest.raises(ValueError, match="ranks: 'x' matches none of the layers 0, 2, 4, 6, 8"):
        Factorize(ranks=(("x", "matrix", 2),)).attach(network())
    with pytest.raises(ValueError, match=r"stage 1 \(Factorize\): calibration=2 needs train_data"):
        co.compress(network(), Recipe([Factorize(rank=2, calibration=2)]), log=False)
    tied = nn.ModuleDict({"a": nn.Embedding(40, 40), "0": nn.Linear(40, 40)})
    tied["0"].weight = tied["a"].weight
    with pytest.raises(ValueError, match="layer '0' shares its weight"):
        Factorize(rank=2, layers="0").attach(tied)
