"""CifarNet, the VGG variant whose compression table this project reproduces (Mayo, MIT licence)."""

from __future__ import annotations

import torch
from torch import nn

# (out_channels, stride, padding, dropout after it)
_LAYERS = (
    (64, 1, 0, False),
    (64, 1, 1, False),
    (128, 2, 1, False),
    (128, 1, 1, True),
    (128, 1, 1, False),
    (192, 2, 1, False),
    (192, 1, 1, True),
    (192, 1, 1, False),
)


class CifarNet(nn.Module):
    """Eight 3×3 convolutions with batch normalisation and ReLU, pooled, and a 1×1 classifier.

    1,293,888 weights without batch normalisation and biases; 174 M multiply-accumulates an image
    of 32×32.

    Args:
        num_classes: number of outputs.
        dropout: probability of the two dropouts (after the fourth and the seventh convolution).
        width: factor on every channel count; 1.0 is the published network.

    Shape: input ``[N, 3, H, W]`` float, output ``[N, num_classes]`` logits.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.5, width: float = 1.0) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width must be > 0, got {width}")
        blocks: list[nn.Module] = []
        channels = 3
        for out_channels, stride, padding, drops in _LAYERS:
            out = max(1, round(out_channels * width))
            block = [
                nn.Conv2d(channels, out, 3, stride=stride, padding=padding, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            if drops:
                block.append(nn.Dropout(dropout))
            blocks.append(nn.Sequential(*block))
            channels = out
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        x = x.mean((2, 3), keepdim=True)
        return self.classifier(x).flatten(1)


@torch.no_grad()
def widen(model: CifarNet, width: float, noise: float = 0.0, seed: int = 0) -> CifarNet:
    """A wider network that computes what ``model`` computes, to be trained on: Net2WiderNet.

    The channels that a layer gains are copies of some of its own, drawn at random, and weights that
    read a channel of which there are n now are divided by n.

    Source: Chen, Goodfellow & Shlens 2016 (Net2Net), arXiv 1511.05641, Net2WiderNet.

    Args:
        model: is left as it is.
        width: as of `CifarNet`; no layer may lose channels.
        noise: standard deviation of what is added to the weights of the copies, relative to that of
            their layer. With none, copies have equal gradients and stay copies.
        seed: of the draws and the noise.

    Returns:
        A model in training mode, of ``model``'s dtype and on its device.

    Raises:
        ValueError: ``width`` is too small for a layer, or ``noise`` is negative.
    """
    if noise < 0:
        raise ValueError(f"noise must be >= 0, got {noise}")
    dropout = next(m.p for m in model.modules() if isinstance(m, nn.Dropout))
    wide = CifarNet(model.classifier.out_channels, dropout, width).to(model.classifier.weight)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.arange(3)
    for i, (block, wide_block) in enumerate(zip(model.features, wide.features, strict=True)):
        old, new = block[0].out_channels, wide_block[0].out_channels
        if new < old:
            raise ValueError(f"width must keep {old} channels of features.{i}, got {width}: {new}")
        weight = _reading(inputs, block[0].weight)
        drawn = torch.randint(old, (new - old,), generator=generator)
        inputs = torch.cat([torch.arange(old), drawn])
        copies = weight[drawn]
        copies += noise * weight.std() * torch.randn(copies.shape, generator=generator).to(copies)
        wide_block[0].weight.copy_(torch.cat([weight, copies]))
        state = block[1].state_dict()
        wide_block[1].load_state_dict({k: v[inputs] if v.dim() else v for k, v in state.items()})
    wide.classifier.weight.copy_(_reading(inputs, model.classifier.weight))
    wide.classifier.bias.copy_(model.classifier.bias)
    return wide


def _reading(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` for inputs that are these of its own, in shares where one comes repeatedly."""
    shares = 1 / torch.bincount(inputs, minlength=weight.shape[1]).to(weight)
    return weight[:, inputs] * shares[inputs].view(1, -1, 1, 1)
