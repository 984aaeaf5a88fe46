"""convert() to modules that run on integers: which takes a layer, why not, and the file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import TOKENS, Tied, compressed

from compressops.compress import Quantize
from compressops.convert import convert
from compressops.formats import Huffman, Int, LowRank, Number, Ternary
from compressops.nn import (
    Int4Linear,
    Int8Linear,
    IntEmbedding,
    LowRankIntegerLinear,
    LowRankLinear,
    PackedEmbedding,
    PackedLinear,
    TernaryEmbedding,
    TernaryLinear,
)
from compressops.registry import register
from compressops.report import report
from compressops.serialize import load, save


class Net(nn.Module):
    """Tokens to classes; no weight is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.hidden = nn.Linear(64, 96)
        self.head = nn.Linear(96, 10, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embedding(tokens)).relu())


NUMBERS = [
    (Int(bits=4, group_size=64), Int4Linear, PackedEmbedding),
    (Int(bits=4, group_size=32, symmetric=False), Int4Linear, PackedEmbedding),
    (Int(bits=2), Int4Linear, PackedEmbedding),
    (Int(bits=8), Int8Linear, PackedEmbedding),
    (Ternary("row"), TernaryLinear, TernaryEmbedding),
    (Ternary("group", group_size=16), TernaryLinear, TernaryEmbedding),
]


@pytest.mark.parametrize("residency", ["decoded", "packed"])
@pytest.mark.parametrize(("number", "linear", "embedding"), NUMBERS, ids=str)
def test_modules_and_their_file(
    number: Number, linear: type, embedding: type, residency: str, tmp_path: Path
) -> None:
    model = Net().eval()
    packed = convert(model, (number, Huffman()), prefer="size", residency=residency)
    assert type(packed.embedding) is embedding
    assert type(packed.hidden) is type(packed.head) is linear
    for name in ("embedding", "hidden", "head"):
        weight = getattr(model, name).weight.detach()
        fitted = number.fake_quantize(weight, number.fit(weight))
        assert torch.equal(getattr(packed, name).weight, fitted)
    save(packed, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", Net().eval(), residency)
    assert type(again.hidden) is linear
    assert torch.equal(again(TOKENS), packed(TOKENS))
    for layer in report(again).layers:
        assert layer.backend in ("cpu", "eager", "torch")
    assert report(packed).layers[1].kernel == packed.hidden.op


def test_how_activations_are_taken_is_in_the_file(tmp_path: Path) -> None:
    packed = convert(Net().eval(), {"hidden": Int(bits=8), "head": Int(bits=4)}, prefer="size")
    packed.hidden.set_static(0.02, -3)
    packed.head.quantize_x = True
    # Repacked, layers go on as they were.
    packed = convert(packed, Huffman())
    assert packed.hidden.x_scale == torch.tensor(0.02)
    save(packed, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", Net().eval())
    assert torch.equal(again(TOKENS), packed(TOKENS))
    assert again.head.quantize_x is True
    assert torch.equal(again.hidden.x_zero, torch.tensor(-3, dtype=torch.int8))


REFUSED = [
    (Int(bits=4, group_size=24), "Int4Linear not used: int4_linear needs a group_size that is"),
    (Int(bits=8, group_size=32), "Int8Linear not used: int8_linear needs Int(bits=8, group_size="),
    (Int(bits=6), "Int8Linear not used: int8_linear needs Int(bits=8"),
    (Ternary("group", group_size=8), "TernaryLinear not used: ternary_linear needs a group_size"),
]


@pytest.mark.parametrize(("config", "why"), REFUSED, ids=str)
@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_what_no_integer_kernel_takes_is_said(config: object, why: str, prefer: str) -> None:
    packed = convert(Net(), {"hidden": config}, prefer=prefer)
    assert type(packed.hidden) is PackedLinear
    note = packed.conversion_notes["hidden"].why
    assert why in note
    assert "dense kernel" in note
    assert note.count("not used") == 1
    assert any(why in layer.why for layer in report(packed).layers)


def test_low_rank_integers_run_as_factors() -> None:
    packed = convert(Net(), {"hidden": (LowRank(2), Int(bits=4))})
    assert type(packed.hidden) is LowRankIntegerLinear
    packed = convert(Net(), {"hidden": (LowRank(2), Int(bits=6))})
    assert type(packed.hidden) is LowRankLinear
    note = packed.conversion_notes["hidden"].why
    assert "LowRankIntegerLinear not used: int8_linear needs Int(bits=8" in note


def test_other_numbers_are_not_excused() -> None:
    for config in (None, Huffman()):
        packed = convert(Net(), config)
        assert "not used" not in packed.conversion_notes["hidden"].why


@pytest.mark.parametrize(
    ("number", "linear"), [(Int(bits=4), Int4Linear), (Ternary("row"), TernaryLinear)], ids=str
)
def test_a_trained_layer_keeps_its_function_unless_asked(number: Number, linear: type) -> None:
    model = compressed(Net().eval(), Quantize(number))
    with torch.no_grad():
        expected = model(TOKENS)
    kept = convert(model, prefer="size")
    assert torch.equal(kept(TOKENS), expected)
    assert type(kept.hidden) is PackedLinear
    assert f"{number} asks for it" in kept.conversion_notes["hidden"].why
    # An embedding has no activations to be rounded.
    embedding = TernaryEmbedding if linear is TernaryLinear else IntEmbedding
    assert type(kept.embedding) is embedding
    asked = convert(model, number, prefer="size")
    assert type(asked.hidden) is linear
    # The very integers that were trained.
    assert torch.equal(asked.hidden.weight, model.hidden.weight)
    assert 0 < (asked(TOKENS) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_tied_ternary_weights_are_one_tensor(residency: str, tmp_path: Path) -> None:
    packed = convert(Tied(), Ternary("row"), prefer="size", residency=residency)
    assert (type(packed.embedding), type(packed.head)) == (TernaryEmbedding, TernaryLinear)
    assert packed.embedding.packed_weight is packed.head.packed_weight
    save(packed, tmp_path / "tied.safetensors")
    again = load(tmp_path / "tied.safetensors", Tied, residency)
    assert again.embedding.packed_weight is again.head.packed_weight
    assert torch.equal(again(TOKENS), packed(TOKENS))


@pytest.mark.parametrize(
    ("number", "prefer"), [(Ternary("row"), "speed"), (Int(bits=4), "size"), (Int(bits=8), "size")]
)
def test_tied_weights_stay_in_one_form(number: Number, prefer: str) -> None:
    packed = convert(Tied(), number, prefer=prefer)
    assert (type(packed.embedding), type(packed.head)) == (PackedEmbedding, PackedLinear)
    assert packed.embedding.packed_weight is packed.head.packed_weight
    assert "shared with a layer of another type" in packed.conversion_notes["head"].why


def test_tied_and_trained_stays_in_one_form() -> None:
    packed = convert(compressed(Tied(), Quantize(Ternary("row"))), prefer="size")
    assert (type(packed.embedding), type(packed.head)) == (PackedEmbedding, PackedLinear)
    assert packed.embedding.packed_weight is packed.head.packed_weight


@pytest.mark.parametrize("faster", [True, False])
def test_what_is_measured_slower_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    def fake_times(functions: list[Callable[[], torch.Tensor]]) -> list[float]:
        for function in functions:
            function()
        return [1e-5, 2e-5] if faster else [2e-5, 1e-5]

    monkeypatch.setattr("compressops.rivals.median_times", fake_times)
    packed = convert(Net().eval(), Ternary("row"), example_inputs=TOKENS)
    expected = (TernaryEmbedding, TernaryLinear) if faster else (PackedEmbedding, PackedLinear)
    assert (type(packed.embedding), type(packed.hidden)) == expected
    for name in ("embedding", "hidden"):
        assert "µs" in packed.conversion_notes[name].why


def test_unmeasured_an_embedding_is_not_assumed_faster() -> None:
    packed = convert(Net(), Ternary("row"))
    assert type(packed.embedding) is PackedEmbedding
    assert "prefer='size' asks for it" in packed.conversion_notes["embedding"].why


def test_the_converted_model_compiles() -> None:
    packed = convert(Net().eval(), Ternary("row"), prefer="size")
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(TOKENS), packed(TOKENS))


def test_a_rule_says_accepts_or_refuses() -> None:
    with pytest.raises(ValueError, match="accepts and refuses of PackedLinear"):
        register(nn.Linear, PackedLinear, lambda plan: True, refuses=lambda plan: None)
