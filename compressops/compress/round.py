"""Fewer bits for what is no layer's weight: batch norms and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops.compress import checks
from compressops.compress.activations import InputQuantizer
from compressops.compress.retrain import Retrain
from compressops.compress.sizes import other_tensors
from compressops.compress.stage import Stage
from compressops.formats import pools
from compressops.formats.number import FLOAT_DTYPES
from compressops.model_state import join


@dataclass(frozen=True)
class Round(Stage):
    """Round what is no layer's weight (biases, batch norms with their statistics) to values of a
    shorter float.

    The tensors stay float32 and trainable, so the stage has to follow the last `Retrain`. A file
    stores them in 16 bits, because it writes small tensors in the shortest float that holds them;
    larger ones than it does that with (65,536 bytes) stay as they are. Next to weights of a few
    bits, CifarNet's batch norms in float32 are a tenth of the file.

    Args:
        dtype: ``"bfloat16"``, which has float32's range.
    """

    dtype: str = "bfloat16"

    main_field: ClassVar[str | None] = "dtype"

    def __post_init__(self) -> None:
        # float16 would turn a large variance into infinity.
        checks.choice("dtype", self.dtype, ("bfloat16",))

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        if any(isinstance(stage, Retrain) for stage in later):
            raise ValueError("a Retrain comes later, and would train what was rounded")
        if not _rounded(model):
            raise ValueError("there is nothing to round: no small float32 but layers' weights")

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        for tensor in _rounded(model):
            tensor.copy_(tensor.to(FLOAT_DTYPES[self.dtype]))


def _rounded(model: nn.Module) -> list[Tensor]:
    """What a file stores in the pool of float32, without what is computed, and without the ranges
    of quantized inputs, which decide on codes."""
    computed = {
        join(name, key)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for key in module.parametrizations
    }
    ranges = {
        join(name, key)
        for name, module in model.named_modules()
        if isinstance(module, InputQuantizer)
        for key in module._buffers
    }
    return [
        tensor
        for name, tensor in other_tensors(model).items()
        if tensor.dtype == torch.float32
        and tensor.nbytes <= pools.MAX_BYTES
        and name not in computed | ranges
    ]
