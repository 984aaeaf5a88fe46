"""Which layers the stages take: those that convert() has a module for, and tied ones together."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from compressops.compress import Encode, Prune, Quantize, Recipe, compress, record
from compressops.compress.parametrizations import Mask, find
from compressops.compress.select import weight_layers
from compressops.compress.sizes import sizes
from compressops.compress.stage import Stage
from compressops.convert import convert
from compressops.formats import DynamicFixedPoint, Huffman, Int
from compressops.registry import is_layer
from compressops.report import report


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def mixed() -> nn.Sequential:
    """Layers that can be packed (0, 1) and such that cannot."""
    model = nn.Sequential(
        nn.Linear(6, 6),
        nn.Conv2d(1, 2, 3),
        nn.Conv3d(1, 2, 3),
        Doubled(6, 6),
        nn.Embedding(5, 6, max_norm=1.0),
        nn.LayerNorm((4, 6)),
        nn.Linear(6, 6),
        nn.Linear(6, 6),
    )
    parametrize.register_parametrization(model[6], "bias", Half())
    prune.l1_unstructured(model[7], "weight", 0.5)
    # Otherwise torch cannot copy the model.
    model[7].weight = model[7].weight.detach()
    return model


def check(model: nn.Module, *stages: Stage) -> None:
    Recipe(stages).validate(model, train_data=[0], eval_data=None, teacher=None)


STAGES = [Prune, Quantize, Encode]


def stage(kind: type, **options) -> Stage:
    return kind({Prune: 0.5, Quantize: Int(4), Encode: Huffman()}[kind], **options)


@pytest.mark.parametrize("kind", STAGES)
def test_stages_take_what_convert_can_pack(kind: type) -> None:
    model = mixed()
    assert list(weight_layers(model)) == ["0", "1"]
    stage(kind).attach(model)
    assert [record(m) is not None for m in model] == [True, True, *[False] * 6]
    packed = convert(model)
    taken = [name for name, note in packed.conversion_notes.items() if "packed as" in note.why]
    assert taken == ["0", "1"]


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ("2", "no packed module is registered for Conv3d"),
        ("3", "no packed module is registered for Doubled"),
        ("4", "max_norm=1.0 rewrites it"),
        ("6", "its bias is parametrized"),
        ("7", "its weight is no parameter"),
    ],
)
def test_a_layer_that_cannot_be_packed_must_not_be_named(kind: type, layer: str, why: str) -> None:
    for globs in (layer, ("0", layer), f"[{layer}]"):
        with pytest.raises(ValueError, match=rf"layer '{layer}' cannot be compressed: {why}"):
            check(mixed(), stage(kind, layers=globs))
    check(mixed(), stage(kind, exclude=layer))
    # convert gives the same reason for leaving it.
    assert why in convert(mixed(), Int(4)).conversion_notes[layer].why


def test_a_norm_is_no_layer() -> None:
    assert not is_layer(nn.LayerNorm((4, 6)))
    with pytest.raises(ValueError, match="layers: '5' matches no layer"):
        check(mixed(), Prune(0.5, layers="5"))


def test_a_linear_with_a_parametrized_bias_is_reported() -> None:
    packed = convert(mixed(), Int(4))
    assert type(packed[0]).__name__ != "Linear"
    (line,) = [layer for layer in report(packed).layers if layer.name == "6"]
    assert "its bias is parametrized" in line.why


@pytest.mark.parametrize("kind", STAGES)
def test_weight_norm_is_named(kind: type) -> None:
    model = nn.Sequential(nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6)))
    with pytest.raises(ValueError, match="layer '1': its weight is computed by WeightNorm already"):
        check(model, stage(kind))
    check(model, stage(kind, exclude="1"))
    assert sizes(model).stored_bytes == 4 * 2 * (36 + 6)


def test_the_old_weight_norm_is_named() -> None:
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5))
    with pytest.raises(ValueError, match="layer '0': its weight is no parameter.*make it permane"):
        check(model, Prune(0.5))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.middle = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(x)).relu())


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(("part", "other"), [("head", "embedding"), ("embedding", "head")])
def test_half_of_a_tie_is_refused(kind: type, part: str, other: str) -> None:
    message = rf"layer '{part}' shares its weight with '{other}' .*select both"
    with pytest.raises(ValueError, match=message):
        check(Tied(), stage(kind, layers=part))
    with pytest.raises(ValueError, match=message):
        check(Tied(), stage(kind), stage(kind, exclude=other))
    check(Tied(), stage(kind), stage(kind, layers=("head", "embedding")))


def test_a_weight_shared_with_a_layer_that_stays_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Doubled(6, 6))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="layer '0' shares its weight with '1'"):
        check(model, Prune(0.5))


@pytest.mark.parametrize("schedule", ["one_shot", "surgery"])
def test_tied_layers_are_one_weight(schedule: str) -> None:
    model = Tied()
    stages = Prune(0.3, scope="global", schedule=schedule), Quantize(DynamicFixedPoint(6))
    for each in (*stages, Encode(Huffman())):
        each.attach(model)
    weights = 40 * 16 + 16 * 16
    kept = sum(int(find(m, Mask).mask.sum()) for m in (model.embedding, model.middle))
    assert kept == round(0.3 * weights)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for other in (model, copy.deepcopy(model)):
        assert torch.equal(other.head.weight, other.embedding.weight)
        assert find(other.head, Mask) is find(other.embedding, Mask)
    found = sizes(model)
    assert found.density == kept / weights
    assert found.ideal_rate == pytest.approx(32 * weights / (6 * kept))
    packed = convert(model)
    assert packed.embedding.packed_weight is packed.head.packed_weight
    both = packed.embedding.packed_weight, packed.middle.packed_weight
    assert found.stored_bytes == sum(weight.packed().nbytes for weight in both)


def test_a_tied_model_counts_its_weight_once() -> None:
    plain = sizes(Tied())
    assert plain.stored_bytes == 4 * (40 * 16 + 16 * 16)
    assert plain.stored_rate == plain.ideal_rate == 1.0
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers[1].bias = layers[0].bias
    assert sizes(layers).stored_bytes == 4 * (16 + 16 + 4)


def test_activations_pass_over_embeddings() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    data = [(torch.tensor(i % 9), i % 3) for i in range(12)]
    recipe = Recipe([Quantize(Int(8), activations=Int(8))])
    result = compress(Tokens(), recipe, data, data, log=False)
    assert result.model.head.input_quantizer.observed
    assert not hasattr(result.model.embedding, "input_quantizer")
    assert record(result.model.embedding).number == Int(8)
    torch.save(result.model.state_dict(), io.BytesIO())
    for layers in ("embedding", ("*", "embedding"), "emb*"):
        with pytest.raises(
            ValueError, match=r"activations=Int\(.*the inputs of layer 'embedding' are indices"
        ):
            check(Tokens(), Quantize(Int(8), activations=Int(8), layers=layers))
