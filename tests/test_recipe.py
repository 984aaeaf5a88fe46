"""Recipes: Python and YAML, what is refused before any work, and compress() from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from retrain_worker import Points, network

from compressops.compress import (
    Encode,
    Equalize,
    Prune,
    Quantize,
    Recipe,
    Retrain,
    compress,
    run_recipe,
)
from compressops.compress import run as run_module
from compressops.compress.select import weight_layers
from compressops.compress.sizes import sizes
from compressops.distill import LogitsKD
from compressops.formats import DynamicFixedPoint, FixedPoint, Huffman, Int, Ternary
from compressops.train import Accuracy
from compressops.zoo import minilm
from compressops.zoo.registry import MODELS

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

FULL = Recipe(
    [
        Prune(0.1565, scope="global", score="lamp", schedule="cubic", exclude=("4",)),
        Retrain(
            epochs=0.5,
            lr=1e-3,
            optimizer="muon",
            image_sizes=((24, 0.5), (32, 0.5)),
            distill=(LogitsKD(4.0), LogitsKD(kind="mse", weight=0.1)),
        ),
        Equalize(),
        Quantize(DynamicFixedPoint(bits=6), activations=Int(8)),
        Quantize(Ternary(), layers="4"),
        Retrain(steps=7),
        Encode(Huffman(max_length=10)),
    ],
    model={"CifarNet": {"width": 0.5}},
    data={"Cifar10": {}},
    teacher="model",
)


def test_yaml_round_trip(tmp_path: Path) -> None:
    assert Recipe.from_yaml(FULL.to_yaml()) == FULL
    FULL.to_yaml(tmp_path / "full.yaml")
    assert Recipe.from_yaml(tmp_path / "full.yaml") == FULL
    assert Recipe.from_yaml(str(tmp_path / "full.yaml")).folder == tmp_path


def test_short_forms() -> None:
    text = """
stages:
- Prune: 0.5
- Retrain: {epochs: 2, lr: 1e-3, distill: LogitsKD}
- Quantize: {DynamicFixedPoint: {bits: 6}, layers: ["0"]}
- Quantize: {number: {Int: {bits: 4}}}
- Equalize
- Encode: Huffman
"""
    assert Recipe.from_yaml(text).stages == (
        Prune(0.5),
        Retrain(epochs=2, lr=0.001, distill=LogitsKD()),
        Quantize(DynamicFixedPoint(6), layers=("0",)),
        Quantize(Int(4)),
        Equalize(),
        Encode(Huffman()),
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_fit_their_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "encoder", _small_encoder)
    recipe = Recipe.from_yaml(path)
    ((name, arguments),) = recipe.model.items()
    model = MODELS[name](**{k: v for k, v in arguments.items() if k != "checkpoint"})
    teacher = model if recipe.teacher == "model" else None
    recipe.validate(model, train_data=[0], eval_data=[0], teacher=teacher)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def _small_encoder() -> nn.Module:
    """What MiniLM is, with fewer weights, where its package is not installed."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 8, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**shape, num_hidden_layers=6)
    return transformers.BertModel(config, add_pooling_layer=False)


def test_pruned_recipes_share_their_first_stages() -> None:
    folder = RECIPES[0].parent
    names = ("cifarnet_pruned", "cifarnet_pruned_fixed6", "cifarnet_pruned_dfp6")
    recipes = [Recipe.from_yaml(folder / f"{name}.yaml") for name in names]
    assert len({(r.stages[:2], str(r.model), str(r.data), r.teacher) for r in recipes}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages:\n- Prun: {}", r"stage 1: unknown 'Prun'; known are Encode, Equalize, .*Retrain"),
        ("stage:\n- Prune: 0.5", "unknown key 'stage'; allowed are version, model"),
        ("stages:\n- Prune: 0.5\n- Prune: {densty: 1}", r"stage 2 \(Prune\): unknown key 'densty'"),
        ("stages:\n- Prune: {density: 1.2}", r"stage 1 \(Prune\): density .* got 1.2"),
        ("stages:\n- Prune: {density: half}", r"\(Prune\): density .* got 'half'"),
        ("stages:\n- Prune: {}", r"stage 1 \(Prune\): .*'density'"),
        ("stages:\n- Quantize: {Int: {bits: 9}}", r"number \(Int\): Int: bits .* got 9"),
        ("stages:\n- Quantize: {Int: {bit: 4}}", r"number \(Int\): Int has no field 'bit'"),
        ("stages:\n- Quantize: {Imt: {bits: 4}}", "unknown key 'Imt'; allowed are number, "),
        ("stages:\n- Quantize: {number: 8}", "number must be one name .* got 8"),
        ("stages:\n- Encode: {coding: Zip}", "coding: unknown 'Zip'; known are Huffman, Raw"),
        ("stages:\n- Retrain: {epochs: 1, distill: [KD]}", "distill: unknown 'KD'; known are"),
        ("stages:\n- Retrain: {}", "give epochs or steps"),
        ("stages:\n- Retrain: {epochs: 1, lr: fast}", "lr must be a number .* got 'fast'"),
        ("stages:\n- Prune: 0.5\n- {Prune: 0.5, Encode: Raw}", "stage 2 must be one name"),
        ("stages: 5\n", "stages must be a list, got 5"),
        ("stages: []\n", "at least one stage"),
        ("version: 2\nstages:\n- Prune: 0.5", "version must be 1, got 2"),
        ("version: true\nstages:\n- Prune: 0.5", "version must be 1, got True"),
        ("stages:\n- Prune: 0.5\n? [a]: 1", "not valid YAML: a key must be a name"),
        ("stages:\n- Prune:\n    ? {a: 1}\n    : 1", "not valid YAML: a key must be a name"),
        ("", r"source must be a path or YAML text, got '\\n'"),
        ("stages:\n- Prune: {density: 0.5, density: 0.4}", "'density' is given twice"),
        ("stages:\n- Prune: [", "not valid YAML"),
        ("- Prune: 0.5\n- Encode: Raw", "must be a mapping"),
    ],
)
def test_what_a_yaml_recipe_may_not_say(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(text + "\n")


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="source must be a path or YAML text, got ''"):
        Recipe.from_yaml("")
    with pytest.raises(FileNotFoundError):
        Recipe.from_yaml("no/such/recipe.yaml")


@pytest.mark.parametrize(
    ("stages", "given", "message"),
    [
        ([Prune(0.5, layers="body*")], {}, r"stage 1 \(Prune\): layers: 'body\*' matches no"),
        ([Prune(0.5), Quantize(Int(4), exclude="7")], {}, r"stage 2 \(Quantize\): exclude: '7'"),
        ([Retrain(1)], {"train_data": None}, r"stage 1 \(Retrain\) needs train_data"),
        ([Retrain(1, distill=LogitsKD())], {}, r"stage 1 \(Retrain\) distils, which needs a tea"),
        ([Quantize(Int(4), activations=Int(8))], {"train_data": None}, "needs train_data to find"),
        ([Retrain(1), Retrain(1, mixed_precision="bf16")], {}, "share one mixed_precision"),
        ([Quantize(Int(4)), Equalize()], {}, r"stage 2 \(Equalize\): layer '0' is quantized"),
    ],
)
def test_what_does_not_fit_the_model(stages: list, given: dict, message: str) -> None:
    model = network()
    before = model.state_dict()
    data = {"train_data": Points(60), **given}
    with pytest.raises(ValueError, match=message):
        compress(model, Recipe(stages), eval_data=Points(60), log=False, **data)
    assert list(model.state_dict()) == list(before)


def test_data_that_does_not_serve() -> None:
    recipe = Recipe([Retrain(1, batch_size=16)])
    for bad, error, message in (
        (iter([1]), TypeError, "train_data must be a map-style data set"),
        ([], ValueError, "train_data is empty"),
        (Points(4), ValueError, "batch_size=16 is more than the 4 training samples"),
    ):
        with pytest.raises(error, match=message):
            compress(network(), recipe, train_data=bad, log=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 61}, ValueError, "batch_size=61 is more than the 60 training samples"),
        ({"batch_size": 8, "accumulate": 9}, ValueError, "accumulate=9 is more than the 8 samples"),
        ({"batch_size": 8, "image_sizes": ((8, 1.0),)}, TypeError, r"Points has no set_size\(\)"),
    ],
)
def test_every_retrain_is_checked_before_any_work(
    options: dict, error: type, message: str, monkeypatch
) -> None:
    monkeypatch.setattr(run_module, "train", None)
    monkeypatch.setattr(run_module, "evaluate", None)
    recipe = Recipe([Retrain(1, batch_size=16), Prune(0.5), Retrain(steps=3, **options)])
    with pytest.raises(error, match=rf"stage 3 \(Retrain\): .*{message}"):
        compress(network(), recipe, Points(60), Points(60), log=False)


CHAIN = [
    Prune(0.25, scope="global"),
    Retrain(epochs=1, batch_size=16, lr=0.05),
    Quantize(DynamicFixedPoint(6)),
    Retrain(steps=3, batch_size=16),
    Encode(Huffman()),
]


def _compress(stages: list, workdir: Path | None = None, **kwargs):
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    result = compress(
        network(), Recipe(stages), Points(96), Points(60), workdir=workdir, log=console, **kwargs
    )
    return result, console.export_text()


def test_the_chain_and_its_table() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result, text = _compress(CHAIN)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    table = result.table
    assert len(table) == len(CHAIN) + 1
    total = sum(m.weight.numel() for m in weight_layers(model).values())
    kept = round(0.25 * total)
    assert [row.density for row in table] == [1.0, *[kept / total] * 5]
    assert [row.bits for row in table] == [32, 32, 32, 6, 6, 6]
    assert table[5].ideal_rate == pytest.approx(32 * total / (6 * kept))
    assert table[5].top1 == table[4].top1
    assert table[5].stored_bytes == sizes(result.model).stored_bytes
    assert all(0 <= row.top1 <= row.top5 <= 100 for row in table)
    for part in ("Prune 0.25", "Retrain 3 steps", "DynamicFixedPoint(bits=6)", "Encode Huffman()"):
        assert part in text
        assert part in str(table)
    assert json.loads(table.to_json())[3]["bits"] == 6
    assert [len(epochs) for epochs in result.history] == [0, 1, 0, 1, 0]
    assert not result.model.training


def test_without_data_there_are_sizes_only() -> None:
    result = compress(network(), Recipe([Prune(0.5), Quantize(FixedPoint(4))]), log=False)
    assert [row.top1 for row in result.table] == [None] * 3
    assert result.table[2].ideal_rate == pytest.approx(16)


def test_a_finished_run_is_taken_from_its_folder(tmp_path: Path, monkeypatch) -> None:
    first, _ = _compress(CHAIN, tmp_path)
    monkeypatch.setattr(run_module, "train", None)
    monkeypatch.setattr(run_module, "evaluate", None)
    again, text = _compress(CHAIN, tmp_path)
    assert f"stages 1 to 5 are taken from {tmp_path}" in text
    assert [vars(row) for row in again.table] == [vars(row) for row in first.table]
    assert again.history == first.history
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert str(again.model) == str(first.model)


def test_recipes_share_the_stages_they_begin_with(tmp_path: Path) -> None:
    _compress(CHAIN, tmp_path)
    other = [*CHAIN[:2], Quantize(FixedPoint(6)), *CHAIN[3:]]
    result, text = _compress(other, tmp_path)
    assert "stages 1 to 2 are taken from" in text
    assert "stage 3 is Quantize(number=FixedPoint(bits=6))" in text
    assert "also holds Quantize(number=DynamicFixedPoint(bits=6))" in text
    alone, _ = _compress(other)
    for a, b in zip(result.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_or_model_shares_nothing(tmp_path: Path) -> None:
    _compress(CHAIN[:2], tmp_path)
    _, text = _compress(CHAIN[:2], tmp_path, seed=1)
    assert "holds runs of another model, data set or seed: starting anew" in text
    assert len(list(tmp_path.glob("stage-02-*.pt"))) == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    _compress(CHAIN[:1], tmp_path)
    (path,) = tmp_path.glob("stage-01-*.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"checkpoint {path} cannot be read"):
        _compress(CHAIN[:1], tmp_path)


def test_the_teacher_may_be_the_model() -> None:
    model = network()
    stages = [Prune(0.3), Retrain(steps=4, batch_size=16, distill=LogitsKD(2.0))]
    result, _ = _compress(stages, teacher=model)
    assert next(model.parameters()).device.type == "cpu"
    assert not hasattr(model[0], "parametrizations")
    assert result.history[1][0]["loss"] > 0


def test_activations_are_calibrated_and_restored(tmp_path: Path) -> None:
    stages = [Quantize(Int(8), activations=DynamicFixedPoint(8))]
    result, _ = _compress(stages, tmp_path)
    quantizer = result.model[0].input_quantizer
    assert quantizer.observed
    assert quantizer.range[0] < -1 < 1 < quantizer.range[1]
    again, _ = _compress(stages, tmp_path)
    assert torch.equal(again.model[0].input_quantizer.range, quantizer.range)


def test_parallel_layers_keep_their_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"a": nn.Linear(12, 6), "b": nn.Linear(12, 6)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.heads["a"](x) + self.heads["b"](x)

    stages = [Prune(0.5, layers="heads.a"), Quantize(Int(4), layers="*.b"), Encode(Huffman())]
    result = compress(Two(), Recipe(stages), eval_data=Points(60), log=False)
    assert list(weight_layers(result.model)) == ["heads.a", "heads.b"]


def test_run_recipe_needs_model_and_data(tmp_path: Path) -> None:
    for missing, text in (
        ("model", "data: {Cifar10: {}}\nstages: [{Prune: 0.5}]\n"),
        ("data", "model: {CifarNet: {width: 0.1}}\nstages: [{Prune: 0.5}]\n"),
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"the recipe names no {missing}"):
            run_recipe(tmp_path / "r.yaml", tmp_path / "work")


def test_a_cubic_prune_is_not_measured_twice(monkeypatch) -> None:
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs["title"])
        return Accuracy(50.0, 60.0, 1)

    monkeypatch.setattr(run_module, "evaluate", counting)
    stages = [Prune(0.5, schedule="cubic"), Retrain(steps=2, batch_size=16)]
    result, _ = _compress(stages)
    assert calls == ["stage 0/2 evaluate", "stage 2/2 evaluate"]
    assert result.table[1].top1 == 50.0
