"""The command line: what it prints, and that errors are one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from compressops.cli import app, make_model, parse_config
from compressops.convert import convert
from compressops.formats import Huffman, Int
from compressops.serialize import load, save
from compressops.zoo import registry
from compressops.zoo.cifarnet import CifarNet

SMALL = "{CifarNet: {width: 0.1}}"


def small() -> nn.Module:
    return CifarNet(width=0.1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save(convert(small().eval(), (Int(bits=4), Huffman())), path)
    return path


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_help_names_every_command() -> None:
    text = call("--help")
    assert "COMPRESSOPS_TRACEBACK=1" in text
    for name in ("compress", "convert", "inspect", "verify", "bench", "report"):
        assert name in text
        assert "--help" in call(name, "--help")
    assert call("--version").strip()


def test_inspect_and_verify(saved: Path) -> None:
    text = call("inspect", saved)
    assert "features.3.0.weight" in text
    assert f"{saved.stat().st_size:,}" in text
    info = json.loads(call("inspect", saved, "--json"))
    total = info["header_bytes"] + sum(t["stored_nbytes"] for t in info["tensors"])
    assert total == info["file_bytes"] == saved.stat().st_size
    assert str(saved) in call("verify", saved)
    assert json.loads(call("verify", saved, "--json"))["file_bytes"] == saved.stat().st_size


def test_report(saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    text = call("report", saved, "--model", SMALL, "--html", page)
    assert "PackedConv2d" in text
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    found = json.loads(call("report", saved, "-m", SMALL, "--residency", "packed", "--json"))
    assert found["totals"]["file"] == saved.stat().st_size
    assert len(found["layers"]) == 9


def test_convert(tmp_path: Path) -> None:
    model = small().eval()
    checkpoint, out = tmp_path / "float.safetensors", tmp_path / "packed.safetensors"
    save_file(dict(model.state_dict()), checkpoint)
    words = ("convert", checkpoint, "--model", SMALL, "-o", out)
    call(*words, "-c", "[{Int: {bits: 4, group_size: 32}}, Huffman]")
    weight = load(out, small()).features[3][0].packed_weight.packed()
    assert (weight.number, weight.coding) == (Int(bits=4, group_size=32), Huffman())
    call(*words)  # lossless by default
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(out, small()).eval()(x), model(x))
    call(*words, "-c", "Int: {bits: 4}", "--layers", "features.*")
    assert isinstance(load(out, small()).classifier, nn.Conv2d)


def test_bench(saved: Path) -> None:
    words = ("bench", saved, "-m", SMALL, "--shape", "1,3,16,16", "--rounds", 3)
    figures = json.loads(call(*words, "--json"))
    assert set(figures["seconds"]) == {"dense", "decoded", "packed"}
    assert "against dense" in call(*words)


def test_compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_demo import RECIPE, sample

    monkeypatch.setitem(registry.DATA, "Sample", sample)
    save_file(dict(small().state_dict()), tmp_path / "net.safetensors")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "packed.safetensors"
    recipe.write_text(RECIPE)
    words = ("compress", recipe, "-o", out, "--workdir", tmp_path / "work")
    assert f"{out}: " in call(*words).replace("\n", "")
    rows = json.loads(call(*words, "--json"))["table"]
    assert len(rows) == 5
    assert str(out) in call("verify", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "missing.safetensors"), "missing.safetensors"),
        (("report", "{saved}", "-m", "ResNet"), "unknown model 'ResNet'"),
        (("report", "{saved}", "-m", "{CifarNet: {depth: 3}}"), "'depth'"),
        (("report", "{saved}", "-m", "{CifarNet: {width: 0.2}}"), "does not fit the model"),
        (("report", "{saved}", "-m", "os:nothing"), "no function 'nothing'"),
        (("report", "{saved}", "-m", "no_such_package:f"), "no_such_package"),
        (("report", "{saved}", "-m", "os:getcwd"), "makes a str"),
        (("report", "{saved}", "-m", SMALL, "--residency", "lazy"), "'lazy'"),
        (("report", "{saved}", "-m", SMALL, "--html", "nowhere/x.html"), "nowhere"),
        (("bench", "{saved}", "-m", SMALL, "--shape", "1,x"), "'1,x'"),
        (("convert", "{saved}", "-m", SMALL, "-o", "x", "-c", "Zip"), "unknown 'Zip'"),
        (("convert", "{saved}", "-m", SMALL, "-o", "x", "-c", "{Int: {bits: 99}}"), "99"),
        (("convert", "{saved}", "-m", SMALL, "-o", "x", "-c", "[a"), "not valid YAML"),
        (("convert", "{saved}", "-m", SMALL, "-o", "x"), "does not fit"),
        (("compress", "missing.yaml"), "missing.yaml"),
    ],
)
def test_errors_are_one_line(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = call(*(word.replace("{saved}", str(saved)) for word in words), code=2)
    assert message in error
    assert error.startswith("compressops: error: ")
    assert len(error.splitlines()) == 1


def test_a_corrupt_file_is_named(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    # The weights' bytes; the manifest stands behind them.
    data[len(data) // 2] ^= 1
    saved.write_bytes(data)
    assert "features" in call("verify", saved, code=2)


def test_models_from_python_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text("from torch import nn\ndef net(): return nn.Linear(2, 3)\n")
    assert isinstance(make_model(f"{tmp_path}/nets.py:net"), nn.Linear)
    monkeypatch.chdir(tmp_path)
    assert isinstance(make_model("nets:net"), nn.Linear)


def test_configs() -> None:
    assert parse_config("Huffman") == (Huffman(),)
    assert parse_config("[{Int: {bits: 4}}, Huffman]") == (Int(bits=4), Huffman())
    assert parse_config("Int: {bits: 4}") == (Int(bits=4),)


def test_it_runs_as_a_program(saved: Path) -> None:
    words = [sys.executable, "-m", "compressops.cli", "verify", str(saved.with_name("no"))]
    root = Path(__file__).parents[1]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 2
    assert done.stderr.startswith("compressops: error: ")
    assert "Traceback" not in done.stderr
