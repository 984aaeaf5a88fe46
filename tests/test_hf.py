"""Packed models of transformers: their folder, and what is in memory of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import IDS, SHAPE
from torch import nn

import compressops as co
from compressops.nn import Int8Linear, TernaryEmbedding, TernaryLinear

transformers = pytest.importorskip("transformers", minversion="5")

import compressops.hf as hf  # noqa: E402

CONFIGS: dict[str, Any] = {
    "2-2-8": (co.Ternary(), co.Ternary("row")),
    "8-8-8": (co.Int(8), co.Int(8)),
}


def build(kind: str = "BertForSequenceClassification") -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**SHAPE, num_labels=3)).eval()


def convert(model: nn.Module, bits: str = "2-2-8", coding: Any = None) -> nn.Module:
    number, embedding = CONFIGS[bits]
    coding = coding or co.Raw()
    return co.convert(
        model,
        {
            "bert.embeddings.word_embeddings": (embedding, coding),
            "bert.embeddings.*": None,
            "c*": None,
            "*": (number, coding),
        },
        prefer="size",
    )


def elements(model: nn.Module) -> int:
    """The entries of the largest float tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return max(t.numel() for t in tensors if t.is_floating_point())


@pytest.mark.parametrize("bits", CONFIGS)
@pytest.mark.parametrize("coding", [co.Raw(), co.Huffman()], ids=str)
def test_from_pretrained_loads_the_packed_file(tmp_path: Path, bits: str, coding: Any) -> None:
    model = build()
    packed = convert(model, bits, coding)
    size = hf.save_pretrained(packed, tmp_path)
    assert size == (tmp_path / hf.FILE).stat().st_size
    assert co.verify(tmp_path / hf.FILE).packed >= 14
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not again.training
    assert torch.equal(again(IDS).logits, packed(IDS).logits)
    linear = TernaryLinear if bits == "2-2-8" else Int8Linear
    assert isinstance(again.bert.encoder.layer[1].output.dense, linear)
    if bits == "2-2-8":
        assert isinstance(again.bert.embeddings.word_embeddings, TernaryEmbedding)
        assert elements(again) < SHAPE["vocab_size"] * SHAPE["hidden_size"]
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    # What was switched off for loading is on again, and the float model is as it was.
    assert again._keys_to_ignore_on_load_unexpected != {r".*"}
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match="not serializable"):
        again.save_pretrained(tmp_path / "again")
    # The loaded model is written again as it was.
    assert hf.save_pretrained(again, tmp_path / "again") == size


def test_packed_residency(tmp_path: Path) -> None:
    packed = convert(build(), "8-8-8")
    hf.save_pretrained(packed, tmp_path, residency="packed")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.bert.pooler.dense.residency == "packed"
    assert torch.equal(again(IDS).logits, packed(IDS).logits)


def lies_in(path: Path, tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is a part of this file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[0].split("-") for line in lines if line.endswith(str(path.resolve()))]
    return any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in found)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it has no /proc")
@pytest.mark.parametrize("in_the_folder", [False, True])
def test_files_that_are_mapped(tmp_path: Path, in_the_folder: bool) -> None:
    packed = convert(build(), "8-8-8")
    hf.save_pretrained(packed, tmp_path, mmap=in_the_folder)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    codes = "bert.embeddings.word_embeddings.packed_weight.codes"
    again = load(tmp_path)
    assert lies_in(tmp_path / hf.FILE, again.get_buffer(codes)) == in_the_folder
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.quantization_config["mmap"] = not in_the_folder
    again = load(tmp_path, config=config)
    assert lies_in(tmp_path / hf.FILE, again.get_buffer(codes)) != in_the_folder
    assert torch.equal(again(IDS).logits, packed(IDS).logits)
    config.quantization_config["mmap"] = 1
    with pytest.raises(ValueError, match="mmap must be a bool, got 1"):
        load(tmp_path, config=config)


def test_weights_that_are_tied_stay_one(tmp_path: Path) -> None:
    packed = convert(build("BertForMaskedLM"), "8-8-8")
    hf.save_pretrained(packed, tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, packed(IDS).logits)
    assert again.cls.predictions.bias is again.cls.predictions.decoder.bias


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    hf.save_pretrained(convert(build()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"layer 'bert\.encoder\.layer\.1\..*' does not exist"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"does not fit the model: .*intermediate"):
        load(tmp_path)
    wrong = config | {"quantization_config": {"quant_method": "compressops", "residency": "none"}}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"residency must be .* got 'none'"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    raw = bytearray((tmp_path / hf.FILE).read_bytes())
    raw[-5000] ^= 1
    (tmp_path / hf.FILE).write_bytes(raw)
    with pytest.raises(co.serialize.CorruptFileError):
        load(tmp_path)


def test_models_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no packed layer"):
        hf.save_pretrained(build(), tmp_path)
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        hf.save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=r"residency and mmap alone, got .*\['bits'\]"):
        hf.CompressopsConfig(bits=2)


def test_load_into_shapes_without_weights(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    packed = convert(build())
    co.save(packed, tmp_path / "net.safetensors")

    def skeleton() -> nn.Module:
        with accelerate.init_empty_weights():
            return transformers.BertForSequenceClassification(packed.config).eval()

    again = co.load(tmp_path / "net.safetensors", skeleton)
    assert torch.equal(again(IDS).logits, packed(IDS).logits)
    assert elements(again) < SHAPE["vocab_size"] * SHAPE["hidden_size"]
    assert all(p.requires_grad for p in again.parameters())
    given = skeleton()
    assert co.load(tmp_path / "net.safetensors", given, inplace=True) is given
    assert torch.equal(given(IDS).logits, packed(IDS).logits)
    with pytest.raises(ValueError, match=r"buffer bert\.embeddings\.\w+ .* is on the meta device"):
        co.load(tmp_path / "net.safetensors", build().to("meta"))
