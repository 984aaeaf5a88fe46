"""The models that the tests of convert() work on."""

from __future__ import annotations

import copy

import torch
from torch import nn

from compressops.compress import Encode, Prune, Quantize
from compressops.formats import (
    DynamicFixedPoint,
    Huffman,
)
from compressops.nn import (
    PackedModule,
)
from compressops.registry import is_layer


class Small(nn.Module):
    """One of each supported layer, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12, padding_idx=0)
        self.conv1 = nn.Conv1d(12, 16, 3, padding=1)
        self.up = nn.ConvTranspose1d(16, 16, 3)
        self.conv2 = nn.Conv2d(1, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.up(self.conv1(self.embedding(tokens).transpose(1, 2)))
        x = self.norm(self.conv2(x[:, None])).mean(3)
        return self.head(x.flatten(1))


class Tied(nn.Module):
    """A language model's usual tie, and one block that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.block = nn.Linear(16, 16)
        self.again = self.block
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.block(self.embedding(tokens)).relu()))


TOKENS = torch.arange(40).view(4, 10) % 30


def compressed(model: nn.Module, *stages: object) -> nn.Module:
    model = copy.deepcopy(model)
    for stage in stages or (Prune(density=0.3), Quantize(DynamicFixedPoint(bits=6)), HUFFMAN):
        stage.attach(model)
    return model


HUFFMAN = Encode(Huffman())


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(m).__name__ for name, m in model.named_modules() if is_layer(m)}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, PackedModule)


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs as networks have them: of few directions, some noise, and channels of other sizes."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    mix = torch.randn(columns // 4, columns, generator=fixed)
    sizes = torch.rand(columns, generator=fixed).mul(2).exp()
    signal = torch.randn(rows, columns // 4, generator=generator) @ mix
    return (signal + torch.randn(rows, columns, generator=generator)) * sizes
