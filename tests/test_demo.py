"""The demo, whole, on a small network and real images: its second half in a new process."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressops.demo import __main__ as demo
from compressops.demo.html import png
from compressops.zoo import cifar10, registry
from compressops.zoo.cifarnet import CifarNet
from compressops.zoo.images import Images

RECIPE = """
version: 1
model:
  CifarNet: {checkpoint: net.safetensors, width: 0.1, dropout: 0.0}
data:
  Sample: {}
stages:
- Prune: {density: 0.3}
- Retrain: {steps: 2, batch_size: 16, lr: 0.01}
- Quantize: {DynamicFixedPoint: {bits: 6}}
- Encode: Huffman
"""

# The new process knows the package and this data set, and nothing of the parent.
CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {folders!r}
import test_demo
from compressops.demo.classify import main
from compressops.zoo import registry
registry.DATA["Sample"] = test_demo.sample
main(*map(Path, sys.argv[1:4]))
"""


def sample() -> tuple[Images, Images]:
    tensors = load_file(Path(__file__).parent / "data" / "cifar10_sample.safetensors")
    return tuple(
        Images(
            tensors[f"{part}_images"][:count],
            tensors[f"{part}_labels"][:count].long(),
            cifar10.normalize,
        )
        for part, count in (("train", 32), ("test", 64))
    )


class Tags(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry.DATA, "Sample", sample)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    save_file(dict(CifarNet(width=0.1).state_dict()), tmp_path / "net.safetensors")
    child = tmp_path / "child.py"
    child.write_text(CHILD.format(folders=[str(folder) for folder in Path(__file__).parents[:2]]))
    monkeypatch.setattr(demo, "CLASSIFY", (sys.executable, str(child)))
    out = tmp_path / "out"
    return lambda *more: (
        demo.main(["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out), *more]),
        out,
    )


def test_the_demo_end_to_end(run, capsys: pytest.CaptureFixture) -> None:
    code, out = run()
    assert code == 0
    printed = capsys.readouterr().out
    assert "equal to the last digit" in printed
    for name in ("report.html", "packed.safetensors", "float.safetensors"):
        assert (out / name).is_file()
        assert name in printed
    assert f"{(out / 'packed.safetensors').stat().st_size:,}" in printed
    assert load_file(out / "logits.safetensors")["logits"].shape == (64, 10)
    found = json.loads((out / "result.json").read_text())
    sizes = [(out / f"{n}.safetensors").stat().st_size for n in ("float", "packed")]
    assert [found["float_file_bytes"], found["file_bytes"]] == sizes
    assert found["file_rate"] == sizes[0] / sizes[1]
    assert [row["stage"].split()[0] for row in found["stages"]][1:] == [
        *("Prune", "Retrain", "Quantize", "Encode")
    ]
    assert found["top1"] == found["stages"][-1]["top1"] == found["top1_from_file_in_new_process"]
    assert found["stages"][-1]["stored_bytes"] + found["header_bytes"] == found["file_bytes"]
    assert found["samples"] == 64

    text = (out / "report.html").read_text(encoding="utf-8")
    # Letters of an image can spell anything.
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen["svg"] >= 11  # a histogram for each of the nine layers, accuracy, confusion
    assert "script" not in tags.seen
    assert "http" not in text  # self-contained
    assert "9 of 9 layers run the dense kernel: same speed as before" in text
    assert "nan" not in text.lower().replace("finance", "")
    for stage in ("Prune", "Retrain", "Quantize", "Encode"):
        assert stage in text

    # A second call takes what stands, and says the same.
    stamps = {path: path.stat().st_mtime_ns for path in (out / "work").glob("stage-*.pt")}
    assert stamps
    assert run()[0] == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_a_difference_is_reported_and_fresh_starts_anew(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = {"top1": 12.3, "top5": 45.6, "samples": 64}
    monkeypatch.setattr(demo, "_classify", lambda *args: (found, torch.randn(64, 10)))
    old = tmp_path / "out" / "old"
    old.parent.mkdir()
    old.touch()
    assert run("--fresh")[0] == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    assert not old.exists()


def test_a_missing_checkpoint_is_one_line(
    run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "net.safetensors").unlink()
    code, out = run()
    assert code == 2
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compressops.demo: error: model CifarNet: checkpoint ")
    assert line.endswith("net.safetensors does not exist")


def test_png_is_a_png() -> None:
    import zlib

    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    data = png(image)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    body = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    rows = torch.frombuffer(bytearray(zlib.decompress(body)), dtype=torch.uint8).view(5, 22)
    assert torch.equal(rows[:, 1:].reshape(5, 7, 3), image.permute(1, 2, 0))
