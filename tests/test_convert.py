"""convert(): what becomes what, that bits stay the same, and that failures leave no trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import TOKENS, Small, compressed, is_packed, kinds, same_state, state_of

from compressops.compress import Prune, Quantize, record
from compressops.convert import convert
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
    LowRankLinear,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
)
from compressops.zoo.cifarnet import CifarNet


@pytest.fixture
def small() -> Small:
    model = Small().eval()
    model.norm.running_mean.normal_()
    return model


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
        "up": "ConvTranspose1d",
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
        "not compressed, and no config asks for it",
        "no packed module is registered for ConvTranspose1d",
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


def test_low_rank(small: Small) -> None:
    packed = convert(small, {"head": (LowRank(4), Int(bits=8)), "conv2": None, "conv1": LowRank(3)})
    assert isinstance(packed.head, LowRankLinear)
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


def test_the_whole_model_compiles(small: Small) -> None:
    packed = convert(compressed(small))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), packed(TOKENS))
