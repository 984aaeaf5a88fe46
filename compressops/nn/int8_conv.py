"""Convolutions that hold packed weights and run as 8-bit integers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import ops
from compressops.nn.conv import ConvModule
from compressops.nn.fused import Activating
from compressops.nn.kernel_weight import GroupedWeight, Int8Weight, row_scales
from compressops.ops.int8_conv2d import block_of, packed_shape


class Int8ConvWeight(GroupedWeight, Int8Weight):
    """A convolution's weight of symmetric 8-bit integers, a scale for each output channel.

    Decoded residency holds the int8 codes as `ops.int8_conv2d_pack` lays them out for ``groups``,
    ``scales`` float32 ``[K]`` and ``sums`` int32 ``[K]``; no dense float copy.
    """

    op = "int8_conv2d"
    rows_together = 0  # those of a group are

    def _form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        block = block_of(*self.shape[:2], self.groups, self.device.type == "cpu")
        return packed_shape(tuple(self.shape), self.groups, *block), torch.int8

    def _pack(
        self, codes: Tensor, params: dict[str, Tensor], out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        weight, sums = ops.int8_conv2d_pack(codes.view(self.shape), self.groups, out)
        return weight, row_scales(params, len(codes)), sums


class Int8Conv2d(Activating, ConvModule):
    """`torch.nn.Conv2d` as W8A8: weight ``Int(bits=8)`` per output channel, activations quantized
    per image.

    Runs `ops.int8_conv2d`, with a gradient with respect to the input. The result differs from the
    float layer by the rounding of weight and activations; an image that holds NaN or Inf gives an
    image of NaN. ``weight`` decodes the dense weight on each access. Under autocast the input is
    cast as `Conv2d` casts it, and so is the result.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Args:
        activation: see `Activating`.

    Shape: input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.
    """

    source = nn.Conv2d
    dimensions = 2
    weight_type = Int8ConvWeight
    op = "int8_conv2d"

    def __init__(self, module: nn.Module, weight: Int8ConvWeight, **settings: Any) -> None:
        super().__init__(module, weight, **settings)
        self.packed_weight = weight.for_groups(self.groups)

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(self.taken(input))
        batched = input if input.dim() == 4 else input.unsqueeze(0)
        options = self.stride, padding, self.dilation, self.groups, self.computed()
        output = self.with_weight(ops.int8_conv2d, batched, self.bias, *options)
        return output if input.dim() == 4 else output.squeeze(0)

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input with what the op cannot put around it, and the zeros that it can."""
        around = self._reversed_padding_repeated_twice
        left, right, top, bottom = around
        if self.padding_mode == "zeros":
            # padding="same" of an even reach needs one more after than before.
            if (left, top) == (right, bottom):
                return input, (top, left)
            return F.pad(input, around), (0, 0)
        return F.pad(input, around, mode=self.padding_mode), (0, 0)
