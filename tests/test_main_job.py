"""The main job on real images: compress by a recipe, pack, convert, save, load in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressops as co
from compressops.train.evaluate import evaluate
from compressops.zoo import cifar10
from compressops.zoo.cifarnet import CifarNet
from compressops.zoo.images import Images

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tests" / "data" / "cifar10_sample.safetensors"
CHECKPOINT = ROOT / "recipes" / "cifarnet.safetensors"


@pytest.fixture(scope="module")
def data() -> tuple[Images, Images]:
    sample = load_file(SAMPLE)

    def images(part: str, augment: bool) -> Images:
        labels = sample[f"{part}_labels"].long()
        return Images(sample[f"{part}_images"], labels, cifar10.normalize, augment)

    return images("train", True), images("test", False)


@pytest.fixture(scope="module")
def baseline() -> CifarNet:
    model = CifarNet()
    model.load_state_dict(load_file(CHECKPOINT))
    return model.eval()


def test_shipped_checkpoint_classifies_real_images(baseline: CifarNet, data) -> None:
    accuracy = evaluate(baseline, data[1])
    assert accuracy.top1 > 90
    assert accuracy.top5 > 98


def test_the_shipped_file_is_the_table_s_honest_row(baseline: CifarNet, data) -> None:
    path = ROOT / "bench" / "results" / "cifarnet_honest34x.safetensors"
    row = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    co.verify(path)
    assert path.stat().st_size == row["file_bytes"] <= row["float_file_bytes"] / 34
    accuracy = evaluate(co.load(path, baseline), data[1])
    assert accuracy.top1 > 90
    assert accuracy.top5 > 98


@pytest.fixture(scope="module")
def result(baseline: CifarNet, data) -> co.Result:
    recipe = co.Recipe(
        [
            co.Prune(density=0.1565, scope="global", score="lamp"),
            co.Retrain(steps=4, lr=0.005, batch_size=32),
            co.Quantize(co.DynamicFixedPoint(bits=6)),
            co.Retrain(steps=2, lr=0.001, batch_size=32),
            co.Encode(co.Huffman()),
        ]
    )
    return co.compress(baseline, recipe, *data, log=False)


def test_every_factor_is_there_in_the_file(result, baseline, tmp_path: Path) -> None:
    plain, path = tmp_path / "float.safetensors", tmp_path / "packed.safetensors"
    # The file that anybody has of the float network.
    save_file(baseline.state_dict(), plain)
    co.save(co.convert(result.model), path)
    co.verify(path)
    last = result.table[-1]
    assert last.density == pytest.approx(0.1565, abs=1e-4)
    assert last.ideal_rate == pytest.approx(32 / 6 / 0.1565, rel=1e-3)
    assert plain.stat().st_size / path.stat().st_size >= 24
    # What the table calls stored is what the file spends on tensors, to the byte.
    info = co.inspect(path)
    assert sum(t.stored_nbytes for t in info.tensors) == last.stored_bytes
    assert info.header_bytes + last.stored_bytes == info.file_bytes == path.stat().st_size


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_a_new_process_computes_the_same_bits(result, data, tmp_path: Path, residency: str) -> None:
    path, batch, answer = (tmp_path / f"{n}.safetensors" for n in ("net", "batch", "answer"))
    co.save(co.convert(result.model), path)
    x, _ = data[1].__getitems__(list(range(32)))
    save_file({"x": x.contiguous()}, batch)
    code = f"""
import torch, compressops as co
from safetensors.torch import load_file, save_file
from compressops.zoo.cifarnet import CifarNet
torch.set_num_threads({torch.get_num_threads()})
net = co.load({str(path)!r}, CifarNet, residency={residency!r}).eval()
x = load_file({str(batch)!r})["x"].contiguous(memory_format=torch.channels_last)
weights = {{n: m.packed_weight() for n, m in net.named_modules() if hasattr(m, "packed_weight")}}
with torch.no_grad():
    save_file({{"y": net(x), **weights}}, {str(answer)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(answer)
    weights = {n: m.weight for n, m in result.model.named_modules() if hasattr(m, "weight")}
    names = [name for name in found if name != "y"]
    assert len(names) == 9
    for name in names:
        assert torch.equal(found[name].view(torch.int32), weights[name].detach().view(torch.int32))
    with torch.no_grad():
        expected = result.model(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found["y"], expected)
