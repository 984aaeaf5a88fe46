"""`QuantizeAttention`: what it rounds, its gradients, and the same model from a file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import IDS, SHAPE
from torch import Tensor, nn

import compressops as co
from compressops.compress.activations import InputQuantizer, input_quantizer, quantizer
from compressops.convert import from_packed
from compressops.nn import AttentionQuantizer
from compressops.nn.attention import IMPLEMENTATION, attach, attention, attention_layers, switch

transformers = pytest.importorskip("transformers", minversion="5")

MASK = (torch.arange(12) < torch.tensor([[12], [7]])).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
NUMBERS = [co.Int(bits, symmetric=symmetric) for bits in (8, 4) for symmetric in (True, False)]
ROUNDING = [
    {"number": number, "ranges": ranges} for number in NUMBERS for ranges in ("rows", "running")
] + [{"number": co.DynamicFixedPoint(6), "ranges": "running"}]


def build(kind: str = "BertForSequenceClassification", **shape: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, kind).config_class(**{**SHAPE, **shape}, num_labels=3)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Else all tokens look at all alike.
            parameter.mul_(8 if "query" in name or "key" in name else 3)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def rounded(x: Tensor, number: co.Int, ranges: str) -> Tensor:
    """The formula, in float64: one range for each row, or for all."""
    wide = x.double()
    dims = (-1,) if ranges == "rows" else tuple(range(x.dim()))
    if number.symmetric:
        scale = wide.abs().amax(dims, keepdim=True) / (2 ** (number.bits - 1) - 1)
        return torch.where(scale > 0, torch.round(wide / scale) * scale, 0.0)
    low = wide.amin(dims, keepdim=True).clamp(max=0)
    scale = (wide.amax(dims, keepdim=True).clamp(min=0) - low) / (2**number.bits - 1)
    zero = torch.round(-low / scale)
    codes = (torch.round(wide / scale) + zero).clamp(0, 2**number.bits - 1)
    return torch.where(scale > 0, (codes - zero) * scale, 0.0)


class Seen(nn.Module):
    """A quantizer that keeps what went in and out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        self.before, self.after = x, self.inner(x)
        return self.after


CASES = [
    # N, heads, heads of key and value, queries, keys, d
    (2, 3, 3, 7, 7, 5),
    (1, 4, 2, 1, 9, 16),
    (3, 2, 1, 33, 33, 8),
    (0, 2, 2, 4, 4, 8),
    (2, 1, 1, 0, 3, 4),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ranges", ["rows", "running"])
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_matches_float64(number: co.Int, ranges: str, case: tuple, masked: bool) -> None:
    count, heads, groups, queries, keys, d = case
    torch.manual_seed(0)
    # As they come from a layer: strided.
    query = torch.randn(count, queries, heads, d).transpose(1, 2) * 3
    key, value = (torch.randn(count, keys, groups, d).transpose(1, 2) * 3 for _ in "kv")
    mask = torch.zeros(count, 1, queries, keys)
    mask[..., keys // 2 + 1 :] = torch.finfo(torch.float32).min
    module = nn.Module()
    parts = [Seen(quantizer(number, ranges)) for _ in AttentionQuantizer.parts]
    attach(module, AttentionQuantizer(*parts))
    output, probabilities = attention(module, query, key, value, mask if masked else None, 0.3)
    for part, given in zip(parts, (query, key, None, value), strict=True):
        given = part.before if given is None else given
        assert part.before is given
        expected = rounded(given, number, ranges) if given.numel() else given.double()
        step = given.double().abs().amax() / 2**number.bits * 4 if given.numel() else 1
        wrong = (part.after - expected).abs() > 1e-5 * step
        # Where float32 and float64 round a tie to different sides.
        assert wrong.double().mean().nan_to_num() < 0.01
        assert not given.numel() or (part.after - expected).abs().max() < step
    q, k, p, v = (part.after.double() for part in parts)
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * 0.3 + (mask if masked else 0)
    torch.testing.assert_close(parts[2].before.double(), scores.softmax(-1), rtol=1e-5, atol=1e-6)
    assert probabilities is parts[2].after
    torch.testing.assert_close(output.double(), (p @ v).transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masks", [None, (1, 1), (3, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("ranges", ["rows", "running"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_gradients_a_few_sequences_go_at_a_time(
    count: int, ranges: str, masks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressops.nn.attention._BYTES_AT_ONCE", 2 * 4 * 4 * 9 * 9 + 1)
    torch.manual_seed(0)
    query, key, value = (torch.randn(count, heads, 9, 8) for heads in (4, 2, 2))
    mask = None
    if masks is not None:
        mask = torch.where(torch.rand(min(count, masks[0]), masks[1], 9, 9) < 0.3, -1e9, 0.0)
    module = nn.Module()
    parts = [quantizer(co.Int(8), ranges) for _ in AttentionQuantizer.parts]
    attach(module, AttentionQuantizer(*parts))
    attention(module, query, key, value, mask)  # running ranges begin
    module.eval()
    expected = attention(module, query, key, value, mask)
    calls = []
    parts[2].register_forward_hook(lambda _, args, __: calls.append(tuple(args[0].shape)))
    with torch.no_grad():
        found = attention(module, query, key, value, mask)
    assert calls == [(part, 4, 9, 9) for part in {0: (0,), 1: (1,), 3: (2, 1)}[count]]
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other)


def test_masks_that_would_mask_nothing_are_errors() -> None:
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"attention_mask must be what is added.*torch\.bool"):
        attention(nn.Module(), x, x, x, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        attention(nn.Module(), x, x, x, None, is_causal=True)


def test_gradients_are_straight_through() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3)]
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    module, number = nn.Module(), co.Int(4, symmetric=False)
    rows = [quantizer(number, "rows") for _ in AttentionQuantizer.parts]
    attach(module, AttentionQuantizer(*rows))
    attention(module, *tensors, None)[0].square().sum().backward()

    def through(x: Tensor) -> Tensor:
        return x + (rows[0](x) - x).detach()

    q, k, v = map(through, copies)
    p = through((q @ k.transpose(2, 3) / 2).softmax(-1))
    (p @ v).square().sum().backward()
    for mine, other in zip(tensors, copies, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("BertForSequenceClassification", {}),
        ("RobertaForSequenceClassification", {}),
        ("DistilBertForSequenceClassification", {"dim": 32, "n_heads": 2, "hidden_dim": 48}),
        ("LlamaForCausalLM", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ],
)
def test_attention_of_other_models(kind: str, shape: dict) -> None:
    model = build(kind, **shape)
    model.set_attn_implementation("eager")
    expected = logits(model)
    assert attention_layers(model)
    switch(model)
    kept = MASK.bool() if kind == "LlamaForCausalLM" else ...
    torch.testing.assert_close(logits(model)[kept], expected[kept], rtol=1e-4, atol=1e-4)
    co.QuantizeAttention(co.Int(8)).attach(model)
    change = (logits(model)[kept] - expected[kept]).abs().max()
    assert 0 < change < 0.1 * expected[kept].abs().max()


@pytest.mark.parametrize("rounding", ROUNDING, ids=str)
def test_the_file_computes_what_was_trained(rounding: dict, tmp_path: Path) -> None:
    model = build()
    recipe = co.Recipe(
        [
            co.Quantize(co.Int(8), "bert.encoder.*", activations=co.Int(8), ranges="rows"),
            co.QuantizeAttention(**rounding, calibration=1),
        ]
    )
    again = co.Recipe.from_yaml(recipe.to_yaml())
    assert again.stages == recipe.stages
    data = [({"input_ids": i, "attention_mask": m}, 0) for i, m in zip(IDS, MASK, strict=True)]
    result = co.compress(model, recipe, data, workdir=tmp_path / "work", log=False)
    expected = logits(result.model)
    assert not torch.equal(expected, logits(model))
    assert model.config._attn_implementation != IMPLEMENTATION
    running = [m for m in result.model.modules() if isinstance(m, InputQuantizer)]
    assert len(running) == (8 if rounding["ranges"] == "running" else 0)
    assert all(bool(m.observed) and m.range[0] < m.range[1] for m in running)
    resumed = co.compress(model, recipe, data, workdir=tmp_path / "work", log=False)
    for twin in (resumed.model, copy.deepcopy(result.model)):
        assert torch.equal(logits(twin), expected)
    packed = co.convert(result.model, prefer="size")
    torch.testing.assert_close(logits(packed), expected, rtol=1e-2, atol=1e-2)
    co.save(packed, tmp_path / "net.safetensors")
    co.verify(tmp_path / "net.safetensors")
    loaded = co.load(tmp_path / "net.safetensors", model)
    assert torch.equal(logits(loaded), logits(packed))
    assert len([m for m in loaded.modules() if isinstance(m, AttentionQuantizer)]) == 2
    # The model that it was loaded into is as it was.
    assert not [m for m in model.modules() if isinstance(m, AttentionQuantizer)]
    assert model.config._attn_implementation != IMPLEMENTATION
    assert co.save(loaded, tmp_path / "twice.safetensors")
    first, second = (
        (tmp_path / name).read_bytes() for name in ("net.safetensors", "twice.safetensors")
    )
    assert first == second


def test_from_pretrained(tmp_path: Path) -> None:
    hf = pytest.importorskip("compressops.hf")
    model = build()
    co.QuantizeAttention(co.Int(4, symmetric=False)).attach(model)
    packed = co.convert(model, {"bert.encoder.*": co.Int(8), "*": None})
    hf.save_pretrained(packed, tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(packed))
    again.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="'sdpa', which does not round what the BertSelfAtt"):
        logits(again)


def test_quantizers_are_copied_pickled_and_replaced() -> None:
    model = build()
    co.QuantizeAttention(co.Int(8)).attach(model)
    before = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)
    other = copy.deepcopy(model)
    co.QuantizeAttention(co.Int(3), layers="*.0.*").attach(other)
    numbers = [layer.attention_quantizer.key.number for layer in attention_layers(other).values()]
    assert numbers == [co.Int(3), co.Int(8)]
    assert [len(layer._forward_pre_hooks) for layer in attention_layers(other).values()] == [1, 1]
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)


def test_it_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    model = build()
    co.QuantizeAttention(co.Int(8, symmetric=False)).attach(model)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="inputs cannot be ternary"):
        co.QuantizeAttention(co.Ternary(), ranges="running")
    with pytest.raises(ValueError, match=r"ranges='rows' needs number=Int\(…\), got Dynamic"):
        co.QuantizeAttention(co.DynamicFixedPoint(8))
    with pytest.raises(ValueError, match=r"ranges='rows' needs number=Int\(…\), got None"):
        co.QuantizeAttention(None)
    with pytest.raises(TypeError, match=r"number must be one of DynamicFixedPoint, .* got 8"):
        co.QuantizeAttention(8, ranges="running")
    with pytest.raises(TypeError, match=r"number must be one of DynamicFixedPoint, .* got None"):
        co.QuantizeAttention(None, ranges="running")
    with pytest.raises(ValueError, match=r"ranges must be one of .* got 'columns'"):
        co.QuantizeAttention(co.Int(8), ranges="columns")
    with pytest.raises(ValueError, match=r"calibration must be in \[1, .* got 0"):
        co.QuantizeAttention(co.Int(8), calibration=0)
    stage = co.QuantizeAttention(co.Int(8))
    with pytest.raises(ValueError, match="the Linear has no attention that calls transformers"):
        stage.attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layers: '\*\.9\.\*' matches no layer"):
        co.QuantizeAttention(co.Int(8), layers="*.9.*").attach(build())
    with pytest.raises(ValueError, match=r"exclude=.* leaves no attention of bert.encoder.layer.0"):
        co.QuantizeAttention(co.Int(8), exclude="*").attach(build())
    running = co.Recipe([co.QuantizeAttention(co.Int(8), ranges="running")])
    with pytest.raises(ValueError, match=r"stage 1 .QuantizeAttention.: ranges='running' needs tr"):
        co.compress(build(), running, log=False)
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="does not take softcap of Module"):
        attention(nn.Module(), x, x, x, None, softcap=30.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "expected configs of"),
        ({"more": {}}, "expected configs of"),
        ({"key": {}}, "has number and momentum or ranges, got {}"),
        ({"key": {"number": {"type": "Int", "bits": 8}, "ranges": "all"}}, "ranges must be one of"),
        ({"key": {"number": {"type": "Ternary"}, "momentum": 0.1}}, "inputs cannot be ternary"),
        ({"key": {"number": {"type": "Int", "bits": 8}, "momentum": "x"}}, "momentum must be"),
    ],
    ids=str,
)
def test_corrupt_configs(change: dict, message: str) -> None:
    model = build()
    co.QuantizeAttention(co.Int(8)).attach(model)
    name, layer = next(iter(attention_layers(model).items()))
    config = {**layer.attention_quantizer.get_config(), **change}
    entry = {"config": config, "packed": {}}
    with pytest.raises(ValueError, match=message):
        from_packed(build(), {f"{name}.attention_quantizer": entry})


def test_a_quantizer_without_a_place() -> None:
    entry = {"config": {"type": "AttentionQuantizer"}, "packed": {}}
    for name in ("bert.attention_quantizers", "head.attention_quantizer"):
        with pytest.raises(ValueError, match=f"for '{name}' does not exist in the model"):
            from_packed(nn.Sequential(), {name: entry})


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_rows_that_hold_nan_become_nan(number: co.Int) -> None:
    x = torch.randn(3, 8)
    clean = quantizer(number, "rows")(x)
    x[1, 2] = float("nan")
    y = quantizer(number, "rows")(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_specs_of_quantizers() -> None:
    for made in (quantizer(co.Int(4), "rows"), quantizer(co.FixedPoint(2, 2), "running")):
        again = input_quantizer(made.get_extra_state())
        assert type(again) is type(made)
        assert again.get_extra_state() == made.get_extra_state()
