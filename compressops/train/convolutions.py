"""Convolutions in the Winograd domain while a float model trains on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.ops import winograd_conv2d
from compressops.train.overrides import overridden

# Fewer channels do not pay for the transforms.
_LEAST_CHANNELS = 16
_TILE = 4


@contextlib.contextmanager
def winograd_convolutions(*models: nn.Module | None) -> Iterator[list[str]]:
    """Within the ``with`` block the 3×3 convolutions of ``models`` run as F(4×4, 3×3).

    That takes a quarter of the multiplications, forward and in both gradients. It concerns
    `nn.Conv2d` of stride and dilation 1, zero padding and at least 16 channels (a group) on both
    sides, and of them the calls on float32 CPU tensors outside of autocast; everything else runs
    as it would. Parameters, parametrizations, hooks and ``state_dict`` stay as they are.

    Results differ from those of direct convolution by rounding (``docs/WINOGRAD.md``).

    Yields:
        The names of the modules concerned.
    """

    def replacement(module: nn.Module) -> Callable[..., Tensor] | None:
        return functools.partial(_forward, module) if _eligible(module) else None

    with overridden(filter(None, models), "_conv_forward", replacement) as names:
        yield names


def _eligible(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        # A class that convolves in its own way goes on so.
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and tuple(module.kernel_size) == (3, 3)
        and set(module.stride) == {1}
        and set(module.dilation) == {1}
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= _LEAST_CHANNELS * module.groups
    )


def _forward(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = module.padding
    if isinstance(padding, str):
        padding = (1, 1) if padding == "same" else (0, 0)
    size = [x.shape[i] + 2 * padding[i] - 2 for i in (-2, -1)]
    if (
        x.dim() != 4
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or min(size) < _TILE
    ):
        return F.conv2d(x, weight, bias, 1, padding, 1, module.groups)
    return winograd_conv2d(x, weight, bias, padding, module.groups, tile=_TILE)
