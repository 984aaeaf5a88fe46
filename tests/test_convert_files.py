"""convert(), a file, and from_packed(): the same model again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import HUFFMAN, Small, Tied, compressed, is_packed, kinds

from compressops.compress import Prune, Quantize
from compressops.convert import convert, from_packed
from compressops.formats import DynamicFixedPoint, Float, Huffman, Int, Ternary
from compressops.nn import Int8Linear
from compressops.serialize import load, save


@pytest.fixture
def small() -> Small:
    model = Small().eval()
    model.norm.running_mean.normal_()
    return model


def entries(model: nn.Module) -> dict:
    return {
        name: {"config": m.get_config(), "packed": m.packed_tensors()}
        for name, m in model.named_modules()
        if is_packed(m)
    }


def test_quantized_inputs_go_along() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    model = compressed(model, Quantize(Int(bits=4), activations=DynamicFixedPoint(bits=6)))
    x = torch.randn(16, 12)
    model.train()(x)
    model.eval()
    expected = model(x)
    packed = convert(model)
    assert torch.equal(packed(x), expected)
    assert packed[0].input_quantizer is not model[0].input_quantizer
    assert not torch.equal(packed[0](x), nn.functional.linear(x, packed[0].weight, packed[0].bias))
    again = from_packed(
        nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), entries(packed)
    )
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), expected)
    # Once, by the module itself: a hook would be lost in the file.
    assert not packed[0]._forward_pre_hooks


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_from_packed_rebuilds_the_model(small: Small, residency: str) -> None:
    packed = convert(compressed(small))
    fresh = Small().eval()
    again = from_packed(fresh, entries(packed), residency)
    assert kinds(fresh)["head"] == "Linear"
    assert {k: v for k, v in kinds(again).items() if k != "up"} == {
        k: v for k, v in kinds(packed).items() if k != "up"
    }
    for name in entries(packed):
        there, here = packed.get_submodule(name), again.get_submodule(name)
        assert torch.equal(here.weight, there.weight)
        assert here.residency == residency
    assert again.conversion_notes["head"].was == "Linear"


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_through_a_file_and_back(tmp_path: Path, residency: str) -> None:
    def net() -> nn.Module:
        return nn.Sequential(Tied(), nn.Linear(40, 20), nn.BatchNorm1d(20), nn.Linear(20, 4))

    model = net()[1:]
    quantize = Quantize(Int(bits=4), activations=DynamicFixedPoint(bits=6))
    model = compressed(model, Prune(density=0.5), quantize, HUFFMAN).train()
    x = torch.randn(16, 40)
    model(x)
    packed = convert(model.eval())
    save(packed, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", net()[1:].eval(), residency)
    assert torch.equal(again(x), packed(x))
    assert torch.equal(again(x), model(x))

    tied = convert(
        Tied(), {"embedding": Int(bits=4), "head": Int(bits=4), "block": Int(bits=8)}, prefer="size"
    )
    save(tied, tmp_path / "b.safetensors")
    again = load(tmp_path / "b.safetensors", Tied, residency)
    assert again.embedding.packed_weight is again.head.packed_weight
    assert again.block is again.again
    assert isinstance(again.block, Int8Linear)
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens), tied(tokens))


def test_from_packed_keeps_ties() -> None:
    packed = convert(Tied(), (Int(bits=4), Huffman()))
    again = from_packed(Tied(), entries(packed))
    assert again.embedding.packed_weight is again.head.packed_weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "head", nn.Linear(64, 9)), "'head'.*out_features=8.*out_features=9"),
        (lambda m: setattr(m, "head", nn.Linear(64, 8, bias=False)), "'head'.*bias=True"),
        (lambda m: setattr(m, "conv2", nn.Conv2d(1, 4, 3)), "'conv2'.*padding=same"),
        (lambda m: setattr(m, "conv1", nn.Linear(12, 16)), "'conv1'.*PackedConv1d.*Linear"),
        (lambda m: delattr(m, "embedding"), "'embedding' does not exist in the Small"),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    small: Small, change: Callable[[nn.Module], None], message: str
) -> None:
    packed = convert(compressed(small))
    other = Small()
    change(other)
    with pytest.raises(ValueError, match=message):
        from_packed(other, entries(packed))


def test_an_unknown_module_type_is_named(small: Small) -> None:
    found = entries(convert(small, Int(bits=4)))
    found["head"]["config"]["type"] = "WarpLinear"
    with pytest.raises(ValueError, match="'head': unknown module type 'WarpLinear'; known: Att"):
        from_packed(Small(), found)


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 7)).eval()


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 7, 3)).eval()


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 48), nn.Linear(48, 3)).eval()


ANY_FORM = [
    *(
        (linears, config, torch.Size([5, 48]))
        for config in (Float("float16"), Int(bits=8), Int(bits=4), Ternary())
    ),
    *((convolutions, config, torch.Size([2, 3, 8, 8])) for config in (Huffman(), Int(bits=8))),
    *((embedding, config, torch.Size([4])) for config in (Int(bits=6), Ternary())),
]


def static(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.set_static(0.03, -5)
    return model


@pytest.mark.parametrize("residency", ["decoded", "packed"])
@pytest.mark.parametrize("case", ANY_FORM, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_a_file_replaces_whatever_packed_module_the_model_has(
    tmp_path: Path, case: tuple, residency: str
) -> None:
    make, config, shape = case
    stored = static(convert(make(), config, prefer="size"))
    x = torch.randint(0, 9, shape) if make is embedding else torch.randn(shape)
    save(stored, tmp_path / "net.safetensors")
    others = [other for kind, other, _ in ANY_FORM if kind is make]
    for model in (make(), *(static(convert(make(), other, prefer="size")) for other in others)):
        before = model(x)
        again = load(tmp_path / "net.safetensors", model, residency)
        assert kinds(again) == kinds(stored)
        assert [m.residency for m in again.modules() if is_packed(m)] == [residency] * 2
        assert torch.equal(again(x), stored(x))
        assert torch.equal(model(x), before)


def test_another_kind_of_layer_is_not_replaced() -> None:
    stored = convert(convolutions(), Int(bits=8), prefer="size")
    model = convert(linears(), Int(bits=8), prefer="size")[::2]
    message = "'0': the file has a Int8Conv2d, the model a Int8Linear"
    with pytest.raises(ValueError, match=message):
        from_packed(model, entries(stored))
