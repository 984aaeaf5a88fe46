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
