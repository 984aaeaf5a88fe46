"""convert(): which module takes a layer's place, shared weights, hooks and parametrizations."""

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

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import Tied, compressed

from compressops import backends
from compressops.compress import Quantize
from compressops.convert import convert
from compressops.formats import (
    Huffman,
    Int,
)
from compressops.nn import (
    Int8Linear,
    PackedLinear,
)
from compressops.registry import register
from compressops.report import report


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
    packed = convert(model, Int(bits=6))
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

    monkeypatch.setattr("compressops.rivals.median_times", fake_times)
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


def test_wide_layers_are_not_given_to_int8_linear() -> None:
    layer = nn.Linear(131073, 1, bias=False)
    assert isinstance(convert(layer, Int(bits=8), prefer="size"), PackedLinear)


def test_an_asked_for_backend_that_cannot_serve_raises() -> None:
    with backends.backend("cuda"), pytest.raises(backends.BackendError, match="cuda"):
        convert(nn.Sequential(nn.Linear(8, 8)), Int(bits=8))


def test_hooks_go_along() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    calls = []
    model[0].register_forward_hook(lambda m, i, o: calls.append(type(m).__name__))
    convert(model, Int(bits=6))(torch.randn(1, 4))
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


def test_the_notes_say_where_no_speed_is_gained() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    dense = "runs the dense kernel on decoded weights"
    packed = convert(model, {"0": Int(bits=8), "1": Int(bits=6)}, prefer="size")
    assert dense not in packed.conversion_notes["0"].why
    assert packed.conversion_notes["1"].why.endswith(dense)
    (_, second) = report(packed).layers
    assert dense in second.why
    assert dense in convert(compressed(model)).conversion_notes["0"].why
