"""The zoo: CifarNet, CIFAR-10's files, augmentation, and what recipe files may name."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compressops.zoo import cifar10
from compressops.zoo.cifarnet import CifarNet, widen
from compressops.zoo.images import Images, resize, shift_and_flip
from compressops.zoo.registry import build_data, build_model


def test_cifarnet_is_the_published_network() -> None:
    model = CifarNet()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(w.numel() for w in weights) == 1_293_888
    x = torch.randn(2, 3, 32, 32)
    assert model.eval()(x).shape == (2, 10)
    assert CifarNet(num_classes=7, width=0.1)(x).shape == (2, 7)
    with pytest.raises(ValueError, match="width must be > 0, got 0"):
        CifarNet(width=0)


def test_a_widened_network_computes_the_same() -> None:
    torch.manual_seed(0)
    model = CifarNet(num_classes=7, dropout=0.25, width=0.2).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32, dtype=torch.float64) + 1)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    wide = widen(model, 0.5, seed=1)
    assert [m.p for m in wide.modules() if isinstance(m, torch.nn.Dropout)] == [0.25, 0.25]
    assert [block[0].out_channels for block in wide.features] == [32, 32, 64, 64, 64, 96, 96, 96]
    expected = model.eval()(x)
    torch.testing.assert_close(wide.eval()(x), expected, rtol=1e-10, atol=1e-10)
    # Other draws choose other channels, and noise is small and only on the copies.
    assert not torch.equal(widen(model, 0.5).features[0][0].weight, wide.features[0][0].weight)
    noisy = widen(model, 0.5, noise=1e-3, seed=1)
    before, after = (w.features[3][0].weight for w in (wide, noisy))
    assert torch.equal(before[:26], after[:26])
    assert 0.9e-3 < (after - before)[26:].std() / before[:26].std() < 1.1e-3
    assert 0 < (noisy.eval()(x) - expected).abs().max() < 1e-2 * expected.abs().max()
    assert torch.equal(widen(model, 0.2).eval()(x), expected)
    assert widen(model.to("meta"), 0.5, noise=1e-3).classifier.weight.is_meta
    with pytest.raises(ValueError, match=r"keep 13 channels of features\.0, got 0\.1: 6"):
        widen(model, 0.1)
    with pytest.raises(ValueError, match="noise must be >= 0, got -1"):
        widen(model, 0.5, noise=-1)


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six small files in CIFAR-10's form, with their digests put in place of the real ones."""
    generator = np.random.default_rng(0)
    digests = {}
    for i, name in enumerate(cifar10._SHA256):
        records = generator.integers(0, 256, (4, cifar10._RECORD), np.uint8)
        records[:, 0] = [i, 1, 2, 9]
        (tmp_path / name).write_bytes(records.tobytes())
        digests[name] = hashlib.sha256(records.tobytes()).hexdigest()
    monkeypatch.setattr(cifar10, "_SHA256", digests)
    return tmp_path


def test_cifar10_files(batches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cifar10.load(batches)
    assert data.train_images.shape == (20, 3, 32, 32)
    assert data.test_images.shape == (4, 3, 32, 32)
    assert data.train_labels[::4].tolist() == [0, 1, 2, 3, 4]
    raw = (batches / "data_batch_3.bin").read_bytes()
    # Red, green, blue planes of rows, after the label.
    label, red = struct.unpack_from("BB", raw, 0)
    assert (data.train_labels[8], data.train_images[8, 0, 0, 0]) == (label, red)
    assert data.train_images[8, 2, 31, 31] == raw[3072]
    monkeypatch.setenv("COMPRESSOPS_CIFAR10", str(batches))
    assert torch.equal(cifar10.load().test_images, data.test_images)


def test_an_altered_or_missing_file_is_named(batches: Path) -> None:
    path = batches / "data_batch_2.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has SHA-256 .*, expected"):
        cifar10.load(batches)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_2\.bin is missing"):
        cifar10.load(batches)


def test_datasets(batches: Path) -> None:
    train, test = build_data({"Cifar10": {"root": batches.name}}, batches.parent)
    assert (len(train), len(test)) == (20, 4)
    assert train.augment
    assert not test.augment
    few, _ = cifar10.datasets(batches, train_images=7)
    assert len(few) == 7
    assert few.fingerprint != train.fingerprint
    with pytest.raises(ValueError, match=r"test_images must be in \[1, 4\], got 5"):
        cifar10.datasets(batches, test_images=5)


def _images(n: int = 40, augment: bool = True) -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(n) % 10, cifar10.normalize, augment)


def test_a_batch_depends_on_seed_epoch_and_index_alone() -> None:
    data, other = _images(), _images()
    for d in (data, other):
        d.set_epoch(3, 17)
    x, y = data.__getitems__([5, 30, 7])
    assert torch.equal(x[1], other[30][0])
    assert y.tolist() == [5, 0, 7]
    assert x.is_contiguous(memory_format=torch.channels_last)
    for epoch, seed in ((4, 17), (3, 18)):
        other.set_epoch(epoch, seed)
        assert not torch.equal(other.__getitems__([5, 30, 7])[0], x)


def test_two_epochs_show_both_ways() -> None:
    data = _images()
    data.set_epoch(0, 1)
    first = data._flip.clone()
    assert 5 < first.sum() < 35
    data.set_epoch(1, 1)
    assert torch.equal(data._flip, ~first)
    data.set_epoch(2, 1)
    assert torch.equal(data._flip, first)


@pytest.mark.parametrize("size", [16, 24, 32])
def test_sizes(size: int) -> None:
    for augment in (False, True):
        data = _images(augment=augment)
        data.set_size(size)
        x, _ = data.__getitems__(list(range(40)))
        assert x.shape == (40, 3, size, size)
        if not augment:
            assert torch.equal(x, resize(cifar10.normalize(data.images), size))
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        data.set_size(0)


def test_shift_and_flip() -> None:
    images = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    centre = torch.full((2, 1), 2)
    flip = torch.tensor([False, True])
    out = shift_and_flip(images, centre, centre, flip)
    assert torch.equal(out[0], images[0])
    assert torch.equal(out[1], images[1].flip(-1))
    out = shift_and_flip(images, centre + 2, centre - 1, torch.tensor([False, False]))
    assert torch.equal(out[:, :, :14, 1:], images[:, :, 2:, :-1])
    assert torch.equal(out[:, :, 14], torch.cat([images[:, :, 14, 1:2], images[:, :, 14, :-1]], -1))


def test_the_whole_range_of_shifts_is_used() -> None:
    data = _images(400)
    seen = {
        tuple(p)
        for epoch in range(4)
        for p in (data.set_epoch(epoch, 0), (data._shift * 9).long())[1].tolist()
    }
    assert seen == {(a, b) for a in range(9) for b in range(9)}


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[N, C, S, S\], got torch.float32 \[4, 3"):
        Images(torch.zeros(4, 3, 8, 8), torch.zeros(4), cifar10.normalize)
    with pytest.raises(ValueError, match=r"4 images but labels of shape \[3\]"):
        Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(3), cifar10.normalize)


def test_models_by_name(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = CifarNet(width=0.2)
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    spec = {"CifarNet": {"checkpoint": "net.safetensors", "width": 0.2}}
    loaded = build_model(spec, tmp_path)
    assert not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    with pytest.raises(ValueError, match=r"model CifarNet: .*net\.safetensors does not fit: "):
        build_model({"CifarNet": {"checkpoint": "net.safetensors"}}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*none\.safetensors does not exist"):
        build_model({"CifarNet": {"checkpoint": "none.safetensors"}}, tmp_path)


@pytest.mark.parametrize(
    ("build", "spec", "message"),
    [
        (build_model, {"ResNet": {}}, "unknown model 'ResNet'; known are CifarNet"),
        (build_model, {"CifarNet": {"wdith": 1}}, "unknown argument 'wdith'; allowed are num_cl"),
        (build_model, {"CifarNet": 3}, "arguments must be a mapping, got 3"),
        (build_model, {"CifarNet": {}, "B": {}}, "must be one name with its arguments"),
        (build_data, {"os.system": {}}, "unknown data 'os.system'; known are Cifar10"),
        (build_data, {"Cifar10": {"path": "x"}}, "unknown argument 'path'; allowed are root, "),
    ],
)
def test_names_that_are_not_there(build, spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec)
