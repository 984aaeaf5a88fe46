"""convert(): what becomes what, that bits stay the same, and that failures leave no trace."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from compressops import backends
from compressops.compress import Encode, Prune, Quantize, record
from compressops.convert import convert, from_packed
from compressops.formats import (
    DynamicFixedPoint,
    FixedPoint,
    Float,
    Huffman,
    Int,
    LowRank,
    Raw,
    Sparse,
)
from compressops.nn import (
    Int8Linear,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
)
from compressops.registry import is_layer, register
from compressops.serialize import load, save
from compressops.zoo.cifarnet import CifarNet


class Small(nn.Module):
    """One of each supported layer, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12, padding_idx=0)
        self.conv1 = nn.Conv1d(12, 16, 3, padding=1)
        self.up = nn.ConvTranspose1d(16, 16, 3)
        self.conv2 = nn.Conv2d(1, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.up(self.conv1(self.embedding(tokens).transpose(1, 2)))
        x = self.norm(self.conv2(x[:, None])).mean(3)
        return self.head(x.flatten(1))


TOKENS = torch.arange(40).view(4, 10) % 30


@pytest.fixture
def small() -> Small:
    model = Small().eval()
    model.norm.running_mean.normal_()
    return model


def compressed(model: nn.Module, *stages: object) -> nn.Module:
    model = copy.deepcopy(model)
    for stage in stages or (Prune(density=0.3), Quantize(DynamicFixedPoint(bits=6)), HUFFMAN):
        stage.attach(model)
    return model


HUFFMAN = Encode(Huffman())


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(m).__name__ for name, m in model.named_modules() if is_layer(m)}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_compressed_layers_become_packed_and_compute_the_same_bits(
    small: Small, residency: str
) -> None:
    model = compressed(small)
    with torch.no_grad():
        expected = model(TOKENS)
    before = state_of(model)
    packed = convert(model, residency=residency)
    assert torch.equal(packed(TOKENS), expected)
    assert kinds(packed) == {
        "embedding": "PackedEmbedding",
        "conv1": "PackedConv1d",
        "up": "ParametrizedConvTranspose1d",
        "conv2": "PackedConv2d",
        "head": "PackedLinear",
    }
    assert packed.conv1.packed_weight.packed().coding == Huffman()
    assert "ConvTranspose1d" in packed.conversion_notes["up"].why
    # The compressed model is untouched and shares nothing with the packed one.
    assert same_state(state_of(model), before)
    assert not hasattr(model, "conversion_notes")
    mine = {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    assert mine.isdisjoint(t.data_ptr() for t in [*packed.parameters(), *packed.buffers()])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cifarnet_in_either_memory_format(memory_format: torch.memory_format) -> None:
    model = compressed(CifarNet(width=0.25).eval(), Prune(density=0.2), Quantize(Int(bits=4)))
    model = model.to(memory_format=memory_format)
    x = torch.randn(3, 3, 16, 16).to(memory_format=memory_format)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(convert(model)(x), expected)
        assert torch.equal(convert(model, residency="packed")(x), expected)


def test_a_plain_model_without_config_stays(small: Small) -> None:
    packed = convert(small)
    assert kinds(packed) == kinds(small)
    assert {note.why for note in packed.conversion_notes.values()} == {
        "not compressed, and no config asks for it"
    }
    assert torch.equal(packed(TOKENS), small(TOKENS))
    assert packed.head.weight.data_ptr() != small.head.weight.data_ptr()


def test_a_coding_alone_is_lossless(small: Small) -> None:
    packed = convert(small, Huffman())
    assert torch.equal(packed(TOKENS), small(TOKENS))
    found = packed.head.packed_weight.packed()
    assert (found.number, found.coding) == (Float(), Huffman())


def test_a_number_quantizes_after_training(small: Small) -> None:
    packed = convert(small, (Int(bits=6, group_size=4), Huffman()))
    assert isinstance(packed.embedding, PackedEmbedding)
    assert isinstance(packed.conv1, PackedConv1d)
    assert isinstance(packed.conv2, PackedConv2d)
    assert isinstance(packed.head, PackedLinear)
    number = Int(bits=6, group_size=4)
    for name in ("embedding", "conv1", "conv2", "head"):
        weight = getattr(small, name).weight.detach()
        expected = number.fake_quantize(weight, number.fit(weight))
        assert torch.equal(getattr(packed, name).weight, expected)
        assert packed.conversion_notes[name].why.startswith("compressed after training")
    assert (packed(TOKENS) - small(TOKENS)).norm() < 0.2 * small(TOKENS).norm()


def test_fixed_point_is_fitted_over_the_network(small: Small) -> None:
    with torch.no_grad():
        small.head.weight.mul_(40)
    packed = convert(small, FixedPoint(bits=8))
    numbers = {m.packed_weight.packed().number for m in packed.modules() if is_packed(m)}
    assert len(numbers) == 1
    assert next(iter(numbers)).integer_bits is not None


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, PackedModule)


def test_globs_choose_by_layer_and_the_first_wins(small: Small) -> None:
    packed = convert(
        small, {"head": None, "conv*": (Int(bits=4), Huffman()), "*": Int(bits=5, symmetric=False)}
    )
    assert kinds(packed)["head"] == "Linear"
    assert packed.conversion_notes["head"].why == "left as it is by the config"
    assert packed.conv2.packed_weight.packed().number == Int(bits=4)
    assert packed.embedding.packed_weight.packed().number == Int(bits=5, symmetric=False)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"convolution*": Int(bits=4)}, ValueError, r"'convolution\*' matches no layer"),
        ((Int(bits=4), Int(bits=5)), ValueError, "number twice"),
        ("int8", TypeError, "'int8'"),
        (Int, TypeError, "instance is needed"),
    ],
)
def test_bad_configs(small: Small, config: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        convert(small, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prefer": "beauty"}, "'beauty'"), ({"residency": "lazy"}, "'lazy'")],
)
def test_bad_options(small: Small, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(small, **options)


def test_a_number_on_a_pruned_model_keeps_the_zeros(small: Small) -> None:
    model = compressed(small, Prune(density=0.25))
    packed = convert(model, Int(bits=4))
    kept = record(model.conv1).mask
    assert torch.equal(packed.conv1.weight != 0, kept & (packed.conv1.weight != 0))
    assert packed.conv1.packed_weight.packed().density == pytest.approx(0.25, abs=0.01)
    assert isinstance(packed.conv1.packed_weight.packed().layout, Sparse)


def test_a_second_number_is_refused(small: Small) -> None:
    model = compressed(small, Quantize(DynamicFixedPoint(bits=6)))
    with pytest.raises(ValueError, match=r"'embedding': it was compressed to Dynamic"):
        convert(model, Int(bits=4))
    # The same number, or only a coding, adds nothing lossy.
    expected = model(TOKENS)
    assert torch.equal(convert(model, (DynamicFixedPoint(bits=6), Huffman()))(TOKENS), expected)


def test_filter_fn(small: Small) -> None:
    packed = convert(small, Int(bits=4), filter_fn=lambda m, n: isinstance(m, nn.Conv2d))
    assert [n for n, m in packed.named_modules() if is_packed(m)] == ["conv2"]
    assert packed.conversion_notes["head"].why == "filtered out by filter_fn"


def test_inplace_changes_the_model_itself(small: Small) -> None:
    model = compressed(small)
    expected = model(TOKENS)
    bias = model.head.bias
    assert convert(model, inplace=True) is model
    assert isinstance(model.head, PackedLinear)
    assert model.head.bias is bias
    assert torch.equal(model(TOKENS), expected)


def test_a_failure_with_inplace_changes_nothing(small: Small) -> None:
    with torch.no_grad():
        small.head.weight[0, 0] = float("nan")
    before = state_of(small)
    with pytest.raises(ValueError, match="layer 'head'"):
        convert(small, Int(bits=4), inplace=True)
    after = state_of(small)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert kinds(small)["conv1"] == "Conv1d"
    assert not hasattr(small, "conversion_notes")


def test_the_model_may_be_a_layer_itself() -> None:
    layer = nn.Linear(8, 4)
    packed = convert(layer, Huffman())
    assert isinstance(packed, PackedLinear)
    x = torch.randn(2, 8)
    assert torch.equal(packed(x), layer(x))
    with pytest.raises(ValueError, match="the model itself is the Linear"):
        convert(layer, Huffman(), inplace=True)


class Tied(nn.Module):
    """A language model's usual tie, and one block that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.block = nn.Linear(16, 16)
        self.again = self.block
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.block(self.embedding(tokens)).relu()))


@pytest.mark.parametrize("inplace", [False, True])
def test_shared_weights_stay_shared(inplace: bool) -> None:
    model = Tied().eval()
    reference = copy.deepcopy(model)
    number = Int(bits=8)
    packed = convert(model, number, inplace=inplace, prefer="size")
    assert packed.block is packed.again
    assert isinstance(packed.block, Int8Linear)
    assert packed.embedding.packed_weight is packed.head.packed_weight
    assert isinstance(packed.head, PackedLinear)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert copied.embedding.packed_weight is copied.head.packed_weight
        assert copied.block is copied.again
    packed.half().float()
    assert packed.embedding.packed_weight is packed.head.packed_weight
    weight = reference.head.weight.detach()
    assert torch.equal(packed.head.weight, number.fake_quantize(weight, number.fit(weight)))


def test_a_weight_shared_with_a_layer_that_stays_stays() -> None:
    packed = convert(Tied(), Int(bits=8), filter_fn=lambda m, n: n != "head")
    assert packed.embedding.weight is packed.head.weight
    assert packed.conversion_notes["embedding"].why == "shares its weight with 'head', which stays"


def test_subclasses_are_not_replaced() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    packed = convert(model, Int(bits=4))
    assert [type(m).__name__ for m in packed] == ["Doubled", "PackedLinear"]
    assert "Doubled" in packed.conversion_notes["0"].why


def test_users_can_register_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressops import registry

    monkeypatch.setattr(registry, "_rules", list(registry._rules))

    class Negated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    class PackedNegated(PackedLinear):
        source = Negated

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    register(Negated, PackedNegated, lambda plan: plan.number == Int(bits=4))
    model = nn.Sequential(Negated(4, 4))
    assert type(convert(model, Int(bits=4))[0]) is PackedNegated
    kept = convert(model, Int(bits=3))
    assert type(kept[0]) is Negated
    assert "no other module can run it" in kept.conversion_notes["0"].why
    with pytest.raises(TypeError, match="ReLU"):
        register(nn.Linear, nn.ReLU)


def test_int8_linear_is_for_post_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    monkeypatch.setattr(Int8Linear, "backend", lambda self: "cpu")
    assert type(convert(model, Int(bits=8))[0]) is Int8Linear
    trained = compressed(model, Quantize(Int(bits=8)))
    # Its activations were not quantized in training, so they are not now.
    assert type(convert(trained)[0]) is PackedLinear
    monkeypatch.setattr(Int8Linear, "backend", lambda self: "eager")
    slow = convert(model, Int(bits=8))
    assert type(slow[0]) is PackedLinear
    assert "no compiled kernel" in slow.conversion_notes["0"].why


@pytest.mark.parametrize("faster", [True, False])
def test_int8_linear_is_measured_on_example_inputs(
    monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    seen = []

    def fake_times(functions: list[Callable[[], torch.Tensor]]) -> list[float]:
        seen.append([function().shape for function in functions])
        return [1e-5, 2e-5] if faster else [2e-5, 1e-5]

    monkeypatch.setattr(sys.modules["compressops.convert"], "median_times", fake_times)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4), nn.Dropout()).train()
    packed = convert(model, Int(bits=8), example_inputs=torch.randn(5, 16))
    assert seen == [[(5, 32), (5, 32)], [(5, 4), (5, 4)]]
    assert type(packed[0]) is (Int8Linear if faster else PackedLinear)
    assert "µs" in packed.conversion_notes["0"].why
    assert all(m.training for m in model.modules())


def test_real_measurement_runs() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    packed = convert(model, Int(bits=8), example_inputs=(torch.randn(4, 64),))
    assert "measured" in packed.conversion_notes["0"].why


def test_converting_twice(small: Small) -> None:
    once = convert(compressed(small))
    expected = once(TOKENS)
    twice = convert(once)
    assert torch.equal(twice(TOKENS), expected)
    assert twice.conversion_notes["head"].why == "already packed"
    assert twice.conversion_notes["head"].was == "Linear"
    moved = convert(once, residency="packed")
    assert moved.head.residency == "packed"
    assert once.head.residency == "decoded"
    assert torch.equal(moved(TOKENS), expected)
    raw = convert(once, Raw())
    assert raw.head.packed_weight.packed().coding == Raw()
    assert torch.equal(raw(TOKENS), expected)
    with pytest.raises(ValueError, match="'embedding' is already packed"):
        convert(once, Int(bits=4))


def test_converting_the_rest_later(small: Small) -> None:
    first = convert(small, {"head": Int(bits=4)})
    second = convert(first, {"conv*": Int(bits=6), "head": None})
    assert second.head.packed_weight.packed().number == Int(bits=4)
    assert second.conv2.packed_weight.packed().number == Int(bits=6)


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


def test_hooks_go_along() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    calls = []
    model[0].register_forward_hook(lambda m, i, o: calls.append(type(m).__name__))
    convert(model, Int(bits=4))(torch.randn(1, 4))
    assert calls == ["PackedLinear"]


def test_transformer_encoder_layers_work() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    packed = convert(layer, Huffman())
    assert isinstance(packed.self_attn.out_proj, PackedLinear)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))
    torch.testing.assert_close(packed(x), layer(x))


def test_a_parametrization_of_another_kind_is_packed_over() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    x = torch.randn(2, 6)
    expected = model(x)
    assert torch.equal(convert(model)(x), expected)
    packed = convert(model, Huffman())
    assert isinstance(packed[0], PackedLinear)
    assert not parametrize.is_parametrized(packed[0])
    assert torch.equal(packed(x), expected)


def test_low_rank(small: Small) -> None:
    packed = convert(small, {"head": (LowRank(4), Int(bits=8)), "conv2": None, "conv1": LowRank(3)})
    assert isinstance(packed.head, PackedLinear)
    assert packed.head.packed_weight.packed().layout == LowRank(4)
    assert torch.linalg.matrix_rank(packed.conv1.weight.flatten(1)) == 3
    again = convert(packed, {"head": Huffman()})
    assert again.head.packed_weight.packed().coding == Huffman()
    assert torch.equal(again.head.weight, packed.head.weight)
    with pytest.raises(ValueError, match="layer 'head': LowRank: rank 40"):
        convert(small, {"head": LowRank(40)})


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda m: m.double(), "float64"), (lambda m: m.to("meta"), "meta device")],
)
def test_weights_that_cannot_be_packed_are_named(
    small: Small, change: Callable[[nn.Module], None], message: str
) -> None:
    change(small)
    with pytest.raises(ValueError, match=f"layer 'embedding': .*{message}"):
        convert(small, Int(bits=4))


def test_wide_layers_are_not_given_to_int8_linear() -> None:
    layer = nn.Linear(131073, 1, bias=False)
    assert isinstance(convert(layer, Int(bits=8), prefer="size"), PackedLinear)


def entries(model: nn.Module) -> dict:
    return {
        name: {"config": m.get_config(), "packed": m.packed_tensors()}
        for name, m in model.named_modules()
        if is_packed(m)
    }


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
    with pytest.raises(ValueError, match=r"'head': unknown module type 'WarpLinear'; known: Int8"):
        from_packed(Small(), found)


def test_the_whole_model_compiles(small: Small) -> None:
    packed = convert(compressed(small))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), packed(TOKENS))


def test_an_asked_for_backend_that_cannot_serve_raises() -> None:
    with backends.backend("cuda"), pytest.raises(backends.BackendError, match="cuda"):
        convert(nn.Sequential(nn.Linear(8, 8)), Int(bits=8))
