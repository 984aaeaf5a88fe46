"""save and load: a model comes back whole, or not at all."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch

from compressops import serialize
from compressops.compress.parametrizations import FakeQuantize, register
from compressops.convert import convert as convert_model
from compressops.formats import FixedPoint, Huffman, Int, PackedTensor, Ternary
from compressops.serialize import CorruptFileError, inspect, load, save, verify, write


class PackedLayer(torch.nn.Module):
    """The least that save and load ask of a packed module."""

    def __init__(self, packed: PackedTensor, bias: torch.nn.Parameter) -> None:
        super().__init__()
        self.spec, self.bias = packed.to_spec(), bias
        for name, part in packed.parts.items():
            self.register_buffer(f"weight_{name}", part)

    def packed_tensors(self):
        parts = {name: getattr(self, f"weight_{name}") for name in self.spec["parts"]}
        return {"weight": PackedTensor.from_spec(self.spec, parts)}

    def get_config(self):
        return {"type": "PackedLayer", "bias": True}

    def get_extra_state(self):
        return self.spec


def float_model(features: int = 8) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(features, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2)
    )


def packed_model() -> torch.nn.Module:
    model = float_model()
    weight = PackedTensor.pack(model[0].weight, number=Int(4), coding=Huffman(), lossy=True)
    model[0] = PackedLayer(weight, model[0].bias)
    return model


@pytest.fixture
def convert(monkeypatch):
    """Stands for ``compressops.convert``, which is tested with real modules elsewhere."""

    def from_packed(model, modules, residency, inplace, after_each):
        model = model if inplace else copy.deepcopy(model)
        for name, entry in modules.items():
            assert entry["config"] == {"type": "PackedLayer", "bias": True}
            bias = model.get_submodule(name).bias
            model.set_submodule(name, PackedLayer(entry["packed"]["weight"], bias))
        return model

    module = types.ModuleType("compressops.convert")
    module.from_packed = from_packed
    monkeypatch.setitem(sys.modules, "compressops.convert", module)


@pytest.mark.usefixtures("convert")
def test_a_model_is_saved_and_loaded(tmp_path):
    model, path = packed_model(), tmp_path / "net.safetensors"
    assert save(model, path) == path.stat().st_size
    info = inspect(path)
    assert {t.name for t in info.tensors if t.layout and not t.pooled} == {"0.weight"}
    names = [name for t in info.tensors for name in t.pooled or [t.name]]
    assert sorted(names) == sorted(float_model().state_dict())
    for source in (float_model(), float_model, packed_model(), float_model().to("meta")):
        loaded = load(path, source)
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded is not source


@pytest.mark.usefixtures("convert")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (float_model(9), r"0.weight is torch.float32 \[6, 8\] in the file, .* \[6, 9\] in the"),
        (float_model().half(), r"in the file, torch.float16 \[6, 8\] in the model"),
        (float_model()[:2], "the model lacks 2.bias, 2.weight"),
        (float_model().append(torch.nn.Linear(2, 3)), "the file lacks 3.bias, 3.weight"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, model, message):
    save(packed_model(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=rf"net\.safetensors does not fit the model: .*{message}"):
        load(tmp_path / "net.safetensors", model)


@pytest.mark.usefixtures("convert")
def test_an_altered_file_is_never_loaded(tmp_path):
    path = tmp_path / "net.safetensors"
    save(packed_model(), path)
    data = path.read_bytes()
    for position in range(len(data) - 300, len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(CorruptFileError):
            load(path, float_model)
    write(path, {"0.weight": PackedTensor.pack(torch.zeros(6, 8))})
    with pytest.raises(ValueError, match=r"packed tensor '0\.weight' belongs to no module"):
        load(path, float_model)


class Scaled(torch.nn.Linear):
    """A subclass, whose forward no packed module stands for."""

    def forward(self, input):
        return 2 * super().forward(input)


def quantized(layer: torch.nn.Module) -> None:
    """Quantize without asking whether `convert` could pack it, as `Quantize` does."""
    register(layer, FakeQuantize(Int(bits=4), Int(bits=4).fit(layer.weight.detach())))


def tied(a: torch.nn.Module, b: torch.nn.Module) -> torch.nn.Module:
    b.weight = a.weight
    return torch.nn.Sequential(a, b)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 4, 3)), "'0' (ConvTranspose2d): "),
        (torch.nn.Sequential(torch.nn.Linear(4, 4), Scaled(4, 4)), "'1' (Scaled): "),
        (Scaled(4, 4), "'(the model)' (Scaled): "),
    ],
    ids=["transposed", "subclass", "root"],
)
def test_a_layer_that_convert_left_compressed_is_refused(tmp_path, model, layer):
    quantized(model if isinstance(model, Scaled) else model[-1])
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="the model was not converted") as caught:
        save(model, path)
    assert "compressops.convert(model)" in str(caught.value)
    packed = convert_model(model)
    with pytest.raises(ValueError, match="compressed layer is not packed") as caught:
        save(packed, path)
    assert layer in str(caught.value)
    assert "remove_parametrizations" in str(caught.value)
    assert "not converted" not in str(caught.value)
    assert path.read_bytes() == b"before"


def test_tied_weights_of_which_one_stays_are_refused_too(tmp_path):
    model = tied(torch.nn.Linear(6, 6), Scaled(6, 6))
    quantized(model[0])
    packed = convert_model(model)
    with pytest.raises(ValueError, match=r"'0' \(Linear\): "):
        save(packed, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_parametrization_of_the_architecture_is_saved_and_loaded(tmp_path):
    def make():
        first = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 5))
        return torch.nn.Sequential(first, torch.nn.Linear(5, 3))

    packed = convert_model(make(), {"1": Int(bits=4)})
    save(packed, tmp_path / "net.safetensors")
    x = torch.randn(2, 4)
    assert torch.equal(load(tmp_path / "net.safetensors", make)(x), packed(x))


def tied_model() -> torch.nn.Module:
    embedding, linear = torch.nn.Embedding(8, 16), torch.nn.Linear(16, 8)
    linear.weight = embedding.weight
    return torch.nn.Sequential(embedding, linear)


@pytest.mark.parametrize("coding", [None, Huffman()])
@pytest.mark.parametrize(
    ("make", "number", "keeps_codes"),
    [
        (float_model, Ternary("row"), True),
        (float_model, Int(4), True),
        (float_model, Int(8), True),
        (tied_model, Ternary("row"), True),
        (tied_model, Int(8), False),
        (float_model, FixedPoint(8), False),
    ],
)
def test_only_floats_are_checked_as_floats(
    tmp_path, monkeypatch, make, number, keeps_codes, coding
):
    """What a module keeps as codes is loaded without decoding it, and damaged it is not loaded."""
    model, path = make(), tmp_path / "net.safetensors"
    choice = number if coding is None else (number, coding)
    packed = convert_model(model, {"*": choice}, prefer="size")
    right = serialize._decoded_hash
    with monkeypatch.context() as patch:
        patch.setattr(
            serialize,
            "_decoded_hash",
            lambda name, tensor: "0" * 16 if name.endswith(".weight") else right(name, tensor),
        )
        save(packed, path)
    for loading in (lambda: load(path, make, "packed"), *[lambda: load(path, make)] * keeps_codes):
        for name, value in packed.state_dict().items():
            assert torch.equal(loading().state_dict()[name], value), name
    for checking in (lambda: verify(path), *[lambda: load(path, make)] * (not keeps_codes)):
        with pytest.raises(CorruptFileError, match="decoded bytes have hash"):
            checking()
    data = path.read_bytes()
    for place in range(8 + int.from_bytes(data[:8], "little"), len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(CorruptFileError):
            load(path, make)
