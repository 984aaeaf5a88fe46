"""Which convolutions can run as Winograd's, and the float layers that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from compressops import backends
from compressops.nn.winograd import OP, Winograd
from compressops.ops.winograd_transform import SUPPORTED


def tiles_for(layer: nn.Module) -> tuple[int, ...]:
    """The tiles that the op has for a convolution; empty where it has none, see `why_not`."""
    return () if why_not(layer) else _tiles(layer.kernel_size)


def why_not(layer: nn.Module) -> str | None:
    """Why a convolution cannot run as Winograd's; ``None``: it can."""
    for option in ("stride", "dilation"):
        value = getattr(layer, option)
        if any(v != 1 for v in value):
            return f"Winograd needs {option} 1, got {option}={value}"
    size = tuple(layer.kernel_size)
    if not _tiles(size):
        return f"Winograd needs kernels of 3, 5 or 7 in each dimension (or 1×r), got {size}"
    return None


def _tiles(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    if len(kernel_size) == 2 and kernel_size[0] not in (1, kernel_size[1]):
        return ()
    return tuple(tile for tile, r in SUPPORTED if r == kernel_size[-1])


def checked(layer: nn.Module, winograd: Winograd) -> Winograd:
    """``winograd`` itself, if the layer can run so.

    Raises:
        ValueError: the layer's options, or its kernel size with this tile, are not among those
            of the op.
    """
    reason, tiles = why_not(layer), tiles_for(layer)
    if reason is not None:
        raise ValueError(f"{type(layer).__name__}: {reason}")
    if winograd.tile not in ("auto", *tiles):
        raise ValueError(
            f"{type(layer).__name__}: tile must be one of {tiles} for kernel_size="
            f"{tuple(layer.kernel_size)}, got {winograd.tile}"
        )
    return winograd


def padded(layer: nn.Module, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with what other than zeros goes around it, and the zeros still to be added."""
    if layer.padding_mode != "zeros":
        around = layer._reversed_padding_repeated_twice
        return F.pad(input, around, mode=layer.padding_mode), (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        return input, tuple((size - 1) // 2 for size in layer.kernel_size)
    if layer.padding == "valid":
        return input, (0,) * len(layer.kernel_size)
    return input, tuple(layer.padding)


class WinogradConv(nn.Module):
    """What `WinogradConv1d` and `WinogradConv2d` add to the float layers."""

    op: ClassVar[str] = OP
    options: ClassVar[tuple[str, ...]] = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
        *("dilation", "groups", "padding_mode"),
    )
    source: ClassVar[type[nn.Module]]

    def __init__(
        self, *args: Any, tile: int | str = "auto", aware: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.winograd = checked(self, Winograd(tile, aware))

    @classmethod
    def from_float(
        cls, module: nn.Module, tile: int | str = "auto", aware: bool = False
    ) -> WinogradConv:
        """A layer with ``module``'s options that shares its weight and bias.

        Args:
            module: a float convolution of as many dimensions, of stride and dilation 1.
            tile, aware: see `Winograd`.

        Raises:
            TypeError: ``module`` is of another type.
            ValueError: the op does not have its options, or not with this tile.
        """
        if not isinstance(module, cls.source):
            raise TypeError(
                f"module: {cls.__name__} replaces a {cls.source.__name__}, got a "
                f"{type(module).__name__}"
            )
        options = {name: getattr(module, name) for name in cls.options}
        new = cls(**options, bias=module.bias is not None, device="meta", tile=tile, aware=aware)
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = padded(self, input)
        return self.winograd(input, weight, bias, padding, self.groups)

    def train(self, mode: bool = True) -> WinogradConv:
        # Not needed where writes are counted; those through .data are seen here at the latest.
        if mode != self.training:
            self.winograd.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WinogradConv:
        # Frees the old device's memory now, not at the next call.
        self.winograd.clear()
        return super()._apply(fn, recurse)

    def get_config(self) -> dict[str, Any]:
        """The JSON values that a file keeps of this layer beside its state."""
        values = {name: getattr(self, name) for name in self.options}
        return {
            "type": type(self).__name__,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
            "bias": self.bias is not None,
            "winograd": self.winograd.get_config(),
        }

    def backend(self) -> str:
        """The backend that runs it."""
        return backends.name(OP, self.weight.device.type)

    def extra_repr(self) -> str:
        aware = ", aware=True" * self.winograd.aware
        return f"{super().extra_repr()}, tile={self.winograd.tile!r}{aware}"


class WinogradConv1d(WinogradConv, nn.Conv1d):
    """`torch.nn.Conv1d` of stride and dilation 1 that runs `ops.winograd_conv2d` on one row.

    As `WinogradConv2d`, for kernels of 3, 5 and 7.

    Shape: input ``[N, in_channels, L]`` or ``[in_channels, L]``.
    """

    source = nn.Conv1d


class WinogradConv2d(WinogradConv, nn.Conv2d):
    """`torch.nn.Conv2d` of stride and dilation 1 that runs `ops.winograd_conv2d`.

    A drop-in: it has the constructor, parameters, state dict and padding of `Conv2d`, for kernels
    of 3×3, 5×5, 7×7 and 1×3, 1×5, 1×7. The result differs by rounding, more so for larger tiles
    (``docs/WINOGRAD.md``). `Winograd` says what it keeps of the weight; in compiled graphs too,
    where no gradient is asked for.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as for `Conv2d`.
        tile, aware: see `Winograd`.

    Shape: input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.

    Raises:
        ValueError: a stride, dilation or kernel size that the op does not have, or not with this
            tile.
    """

    source = nn.Conv2d
