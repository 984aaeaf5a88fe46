"""Equal scales of filters before they are quantized, at no change of the function."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from compressops.compress import checks
from compressops.compress.parametrizations import FakeQuantize, find
from compressops.compress.select import check_plain, match, original
from compressops.compress.stage import Stage

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Equalize(Stage):
    """Scale every filter to one root mean square; the batch norm behind it takes the factor back.

    A batch norm undoes any scale of the filter before it, so the scales are free to choose (the
    idea of cross-layer equalization, Nagel et al. 2019, arXiv 1906.04721): with equal ones, a
    single integer length suits all filters of a tensor, or of the whole network. The model in
    eval mode computes the same up to rounding.

    Args:
        rms: root mean square of a filter's nonzero entries afterwards. 0.375 puts the codes of
            4 bits and integer length 1 at steps of a third of it, which is next to the best for
            normally distributed weights.
        layers: globs over the names of the layers that are followed by a batch norm in an
            `nn.Sequential`; others don't count.
    """

    rms: float = 0.375
    layers: str | tuple[str, ...] = "*"

    main_field: ClassVar[str | None] = "rms"

    def __post_init__(self) -> None:
        checks.number("rms", self.rms, 0, open_low=True)
        object.__setattr__(self, "layers", checks.globs("layers", self.layers))

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        for name, (layer, _) in self._pairs(model).items():
            check_plain(name, layer)
            if parametrize.is_parametrized(layer, "bias"):
                raise ValueError(f"layer {name!r}: its bias is parametrized, and cannot be scaled")
            if find(layer, FakeQuantize) is not None:
                raise ValueError(f"layer {name!r} is quantized already: Equalize must come before")

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        for layer, norm in self._pairs(model).values():
            self._scale(layer, norm)

    def _pairs(self, model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
        pairs = normed_layers(model)
        chosen = match("layers (followed by a batch norm)", self.layers, pairs)
        return {name: pair for name, pair in pairs.items() if name in chosen}

    def _scale(self, layer: nn.Module, norm: nn.Module) -> None:
        weight = layer.weight
        rows = weight.flatten(1).double()
        count = (rows != 0).sum(1).clamp(min=1)
        found = (rows.square().sum(1) / count).sqrt()
        # A filter of zeros alone stays as it is.
        scale = torch.where(found > 0, self.rms / found, 1.0)
        original(layer).mul_(scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(scale)
        norm.running_mean.mul_(scale)
        wanted = (norm.running_var.double() + norm.eps) * scale.square()
        # A variance cannot be below 0; what is missing goes to the norm's own scale.
        variance = (wanted - norm.eps).clamp(min=0)
        norm.weight.mul_(((variance + norm.eps) / wanted).sqrt())
        norm.running_var.copy_(variance)


def normed_layers(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The linear and convolution layers that a batch norm follows in an `nn.Sequential`."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    pairs = {}
    for prefix, sequence in model.named_modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        children = list(sequence.named_children())
        for (name, layer), (_, norm) in itertools.pairwise(children):
            if (
                isinstance(layer, kinds)
                and isinstance(norm, _BATCH_NORMS)
                and norm.affine
                and norm.track_running_stats
            ):
                pairs[f"{prefix}.{name}" if prefix else name] = (layer, norm)
    return pairs
