"""Rounding of the small tensors (norms, biases) to a narrower float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compressops.compress import checks
from compressops.compress.select import weight_layers
from compressops.compress.stage import Stage
from compressops.formats.number import FLOAT_DTYPES


@dataclass(frozen=True)
class Cast(Stage):
    """Round every float tensor beside the layers' weights to values that ``dtype`` can write.

    These are the norms' weights, biases and running statistics and the layers' biases. They stay
    in their own dtype, so the model computes as before; a file can then store them in ``dtype``
    without loss. Must come after the last `Retrain`.

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.

    Raises (when attached):
        ValueError: a value overflows ``dtype``.
    """

    dtype: str

    main_field: ClassVar[str | None] = "dtype"

    def __post_init__(self) -> None:
        checks.choice("dtype", self.dtype, ("bfloat16", "float16"))

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        if any(type(stage).__name__ == "Retrain" for stage in later):
            raise ValueError("Cast must come after the last Retrain, which would undo it")

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        for name, tensor in small_tensors(model).items():
            rounded = tensor.to(FLOAT_DTYPES[self.dtype]).to(tensor.dtype)
            if not torch.equal(rounded.isfinite(), tensor.isfinite()):
                raise ValueError(f"{name} has values too large for {self.dtype}")
            tensor.copy_(rounded)


def small_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The float parameters and buffers that no layer's weight is made of."""
    layers = weight_layers(model)
    weights = {f"{name}.weight" if name else "weight" for name in layers}
    return {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.is_floating_point()
        and name not in weights
        and ".parametrizations." not in f".{name}"
        and ".input_quantizer." not in f".{name}"
    }
