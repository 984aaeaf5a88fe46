"""Convolutions that hold packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from compressops.formats import PackedTensor
from compressops.nn.base import PackedModule
from compressops.nn.weight import PackedWeight
from compressops.nn.winograd import OP, Winograd
from compressops.nn.winograd_conv import checked, padded


class ConvModule(PackedModule):
    """A `PackedModule` with every option of the float convolutions."""

    options = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def __init__(self, module: nn.Module, weight: PackedWeight, **settings: Any) -> None:
        super().__init__(module, weight, **settings)
        # For F.pad: padding before and after each dimension, last dimension first. The float
        # layers' own name, so that a packed layer can be built from either.
        self._reversed_padding_repeated_twice = list(module._reversed_padding_repeated_twice)

    @classmethod
    def _template(cls, config: dict[str, Any]) -> nn.Module:
        # The float layers check their padding and groups, but none of these.
        for name in ("kernel_size", "stride", "dilation", "padding"):
            value, least = config[name], 0 if name == "padding" else 1
            if name == "padding" and isinstance(value, str):
                continue
            if not isinstance(value, (list, tuple)) or len(value) != cls.dimensions:
                raise ValueError(f"{name} must be {cls.dimensions} integers, got {value!r}")
            if any(not isinstance(v, int) or v < least for v in value):
                raise ValueError(f"{name} must be integers from {least} on, got {value!r}")
        return super()._template(config)


class PackedConv(ConvModule):
    """What `PackedConv1d` and `PackedConv2d` share: the choice between torch's convolution of the
    decoded weight and Winograd's."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, module: nn.Module, weight: PackedWeight) -> None:
        super().__init__(module, weight)
        # A layer goes on running as the one did that it is made from.
        runs = getattr(module, "winograd", None)
        self.winograd: Winograd | None = None if runs is None else runs.copy()

    @classmethod
    def from_packed(
        cls,
        config: dict[str, Any],
        packed: dict[str, PackedTensor],
        residency: str = "decoded",
        input_quantizer: nn.Module | None = None,
    ) -> PackedModule:
        """As `PackedModule.from_packed`; ``config["winograd"]``, if there, is its `Winograd`'s."""
        config = dict(config)
        runs = config.pop("winograd", None)
        new = super().from_packed(config, packed, residency, input_quantizer)
        if runs is not None:
            new.run_winograd(Winograd.from_config(runs))
        return new

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return (
            config if self.winograd is None else config | {"winograd": self.winograd.get_config()}
        )

    def run_winograd(self, runs: Winograd | None) -> None:
        """Run as F(tile, r) from now on, or (None) torch's convolution.

        Raises:
            ValueError: the op has no such stride, dilation, kernel size or tile.
        """
        self.winograd = None if runs is None else checked(self, runs)

    @property
    def op(self) -> str | None:
        """``"winograd_conv2d"`` or None."""
        return None if self.winograd is None else OP

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self.quantize_input(input), self.padding
        if self.winograd is not None:
            input, padding = padded(self, input)
            keep = self.residency == "decoded"
            return self.with_weight(self.winograd, input, self.bias, padding, self.groups, keep)
        if self.padding_mode != "zeros":
            input, padding = (
                F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode),
                0,
            )
        options = self.bias, self.stride, padding, self.dilation, self.groups
        return self.with_weight(self.function, input, *options)


class PackedConv1d(PackedConv):
    """`torch.nn.Conv1d` with a packed weight ``[out_channels, in_channels / groups, kernel]``.

    Bit for bit the result of a `Conv1d` that holds ``packed.unpack()``, or of a `WinogradConv1d`
    that does, where it runs as one. With packed residency the weight is then not only decoded but
    transformed on each call.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[N, in_channels, L]`` or ``[in_channels, L]``.
    """

    source = nn.Conv1d
    function = staticmethod(F.conv1d)
    dimensions = 1


class PackedConv2d(PackedConv):
    """`torch.nn.Conv2d` with a packed weight ``[out_channels, in_channels / groups, kh, kw]``.

    Bit for bit the result of a `Conv2d` that holds ``packed.unpack()`` in the same memory format,
    or of a `WinogradConv2d` that does, where it runs as one. With packed residency the weight is
    then not only decoded but transformed on each call.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.
    """

    source = nn.Conv2d
    function = staticmethod(F.conv2d)
    dimensions = 2
