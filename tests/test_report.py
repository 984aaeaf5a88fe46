"""The report: every byte counted once, and readable as text and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from compressops.compress import Encode, Prune, Quantize
from compressops.convert import convert
from compressops.formats import DynamicFixedPoint, Huffman, Int
from compressops.page import nbytes
from compressops.report import report
from compressops.serialize import inspect, load, save
from compressops.zoo.cifarnet import CifarNet


def compressed() -> nn.Module:
    model = CifarNet(width=0.25).eval()
    for stage in (Prune(density=0.2), Quantize(DynamicFixedPoint(bits=6)), Encode(Huffman())):
        stage.attach(model)
    return model


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_figures_add_up(tmp_path: Path, residency: str) -> None:
    packed = convert(compressed(), residency=residency)
    file = tmp_path / "net.safetensors"
    save(packed, file)
    found = report(packed, file)
    assert [layer.became for layer in found.layers] == ["PackedConv2d"] * 9
    assert {layer.was for layer in found.layers} == {"Conv2d"}
    for layer in found.layers:
        held = packed.get_submodule(layer.name).packed_weight
        kept = held.packed()
        assert layer.stored == kept.nbytes
        assert layer.ideal == pytest.approx(layer.dense * layer.density * 6 / 32)
        dense = layer.dense if residency == "decoded" else 0
        # Beside the parts, and the dense copy, there is only the probe of 2×2×2×2 floats.
        assert layer.memory == kept.nbytes + dense + 64
        assert (layer.layout, layer.coding) != ("–", "–")
    info = inspect(file)
    assert found.totals.stored + found.totals.other_stored + info.header_bytes == found.totals.file
    assert found.totals.other_stored < found.totals.other
    assert found.totals.file == file.stat().st_size
    assert found.totals.dense == sum(m.weight.nbytes for m in packed.modules() if is_conv(m))
    # Loaded elsewhere it is the same.
    again = report(load(file, CifarNet(width=0.25), residency), file)
    assert again.totals == found.totals
    # The smallest layer gains less than a chunk's header takes.
    raw = "loaded from a file; stored raw: Huffman coding would gain too little"
    smallest = min(again.layers, key=lambda layer: layer.stored)
    for layer in again.layers:
        assert layer.why == (raw if layer is smallest else "loaded from a file")


def is_conv(module: nn.Module) -> bool:
    return type(module).__name__ == "PackedConv2d"


def test_a_compressed_model_says_what_convert_would_do() -> None:
    found = report(compressed())
    assert {layer.why for layer in found.layers} == {"compressed; convert() packs it"}
    assert found.layers[1].density == pytest.approx(0.2, abs=0.01)
    assert found.totals.file is None
    (run_time, memory) = found.remarks()
    assert "same speed" not in run_time
    assert "9 of 9 compute the weight from what was trained on each call" in run_time
    assert "not smaller" in memory
    assert "Decoded residency" not in memory
    # The originals, and masks beside them, are what is in memory.
    assert found.totals.memory > found.totals.dense


def test_a_plain_model() -> None:
    found = report(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
    (layer,) = found.layers
    assert (layer.dense, layer.ideal, layer.stored, layer.memory) == (128, 128.0, 128, 128)
    assert found.totals.other == 4 * (4 + 4 * 4) + 8
    assert layer.backend == "torch"


def test_shared_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 16)
            self.head = nn.Linear(16, 40, bias=False)
            self.head.weight = self.embedding.weight

    for model in (Tied(), convert(Tied(), Int(bits=4))):
        found = report(model)
        first, second = found.layers
        assert first.stored == found.totals.stored > 0
        assert (second.dense, second.stored, second.memory) == (0, 0, 0)
        assert "shares it" in second.why
        assert found.totals.dense == 40 * 16 * 4


def test_int8_linear_holds_no_dense_copy() -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    packed = convert(model, Int(bits=8), prefer="size")
    (layer,) = report(packed).layers
    assert layer.became == "Int8Linear"
    assert layer.backend in ("cpu", "eager")
    assert layer.memory < 0.6 * layer.dense
    (lean,) = report(convert(model, Int(bits=8), prefer="size", residency="packed")).layers
    assert lean.memory < 0.3 * lean.dense


def test_what_to_expect_is_said_plainly() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    dense = "Run time: 3 of 3 layers run the dense kernel: same speed as before. "
    plain = report(model).remarks()
    assert plain == [
        dense + "No layer runs a faster kernel.",
        "Memory: not smaller than before (49.92 KB, 49.92 KB dense).",
    ]
    config = {"0": Int(bits=6), "2": Int(bits=6), "3": Int(bits=8)}
    found = report(convert(model, Int(bits=6)))
    assert found.remarks()[0] == plain[0]
    assert "not smaller than before" in found.remarks()[1]
    assert "keeps the packed parts beside the dense weights" in found.remarks()[1]

    found = report(convert(model, config, prefer="size"))
    assert [layer.kernel for layer in found.layers] == ["dense", "dense", "int8_linear"]
    backend = found.layers[2].backend
    expected = (
        f"2 of 3 layers run the dense kernel: same speed as before; 1 runs int8_linear ({backend})"
    )
    assert expected in found.remarks()[0]
    assert ("No layer runs a faster kernel" in found.remarks()[0]) == (backend == "eager")
    text = " ".join(str(found).split())
    for remark in found.remarks():
        assert remark in text
    assert f"Int8Linear: int8_linear ({backend})" in text
    assert "PackedLinear: dense" in text
    assert found.to_dict()["remarks"] == found.remarks()
    assert found.layers[0].residency == "decoded"

    found = report(convert(model, config, prefer="size", residency="packed"))
    first, second = found.remarks()
    assert "3 of 3 decode the weight on each call: slower than before." in first
    assert "same speed" not in first
    assert second.startswith("Memory: ")
    assert second.endswith("× smaller.")
    assert "Run time: 2 of 3" in found.to_html()


def test_text_and_page(tmp_path: Path) -> None:
    packed = convert(compressed())
    file = tmp_path / "net.safetensors"
    save(packed, file)
    found = report(packed, file)
    text = str(found)
    for wanted in ("features.3.0", "Huffman", "DynamicFixedPoint(6)", "PackedConv2d", "model"):
        assert wanted in text
    assert f"{file.stat().st_size:,}" in text
    assert max(map(len, text.splitlines())) <= 100
    page = found.to_html()
    assert page.startswith("<!doctype html>")
    assert "classifier" in page
    assert nbytes(file.stat().st_size) in page
    json.dumps(found.to_dict())


def test_names_are_escaped() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>", nn.Linear(2, 2))

    page = report(Odd()).to_html()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (151_951, "152.0 KB"), (5.18e6, "5.18 MB")],
)
def test_bytes_as_people_read_them(count: float, text: str) -> None:
    assert nbytes(count) == text


def test_a_model_without_layers() -> None:
    found = report(nn.Sequential(nn.ReLU()))
    assert found.layers == ()
    assert "–" in str(found)
    assert torch.tensor(found.totals.dense).item() == 0


def test_a_layer_that_gains_nothing_by_coding_is_said_to_stay_raw(tmp_path):
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    with torch.no_grad():
        bits = torch.randint(-(2**31), 2**31 - 1, (100, 100), dtype=torch.int32)
        model[1].weight.copy_(bits.view(torch.float32))
    packed = convert(model, Huffman())
    first, second = report(packed).layers
    said = "stored raw: Huffman coding would gain too little"
    assert said not in first.why
    assert first.stored < 0.87 * first.dense
    assert said in second.why
    assert second.stored == second.dense
    save(packed, tmp_path / "file")
    found = {t.name: t for t in inspect(tmp_path / "file").tensors}
    assert (found["0.weight"].coded, found["1.weight"].coded) == (True, False)
    assert "Huffman (raw)" in str(inspect(tmp_path / "file"))
