"""Layers on block-sparse weights: only the stored blocks are kept in memory, and multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import ops
from compressops.formats import BlockSparse, Layout, Number, PackedTensor
from compressops.nn.base import PackedModule
from compressops.nn.conv import ConvModule
from compressops.nn.fused import Activating
from compressops.nn.kernel_weight import GroupedWeight, Int8Weight, KernelWeight, row_scales
from compressops.nn.linear import KernelLinear
from compressops.nn.weight import outside_graphs
from compressops.ops.bsr import DTYPES, block_size_of, refusal
from compressops.ops.winograd_domain import memory_format


class BlockSparseWeight(KernelWeight):
    """A weight in the layout `BlockSparse`, of any number, for `ops.bsr_linear`.

    Its arguments: the stored blocks in the dtype of the layer, decoded, as `ops.bsr_linear_pack`
    lays them out, their indices, and in decoded residency on a GPU the `ops.bsr_row_order`.
    """

    op = "bsr_linear"
    arguments = ("values", "crow_indices", "col_indices", "row_order")

    @classmethod
    def refusal(cls, layout: Layout, number: Number, shape: tuple[int, ...]) -> str | None:
        return _other_layout(cls.op, layout)

    @outside_graphs
    def _decode_kernel(self) -> tuple[Tensor | None, ...]:
        weight = self._decode()
        # The op computes in these dtypes alone, and refuses the activations of others itself.
        weight = weight if weight.dtype in DTYPES else weight.float()
        matrix, block = self._matrix(weight)
        kernel = _blocks(ops.bsr_linear_pack, matrix, block)
        return *kernel, _row_order(self, matrix.shape, *kernel)

    def _matrix(self, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What the op multiplies with, ``[rows, columns]``, and the size of its blocks."""
        return weight.flatten(1), self._block

    @property
    def _block(self) -> tuple[int, int]:
        return Layout.from_spec(self._spec["layout"]).block

    def _stays_valid(self, before: Tensor, after: Tensor) -> bool:
        return before.dtype == after.dtype and super()._stays_valid(before, after)


class BlockSparseConvWeight(GroupedWeight, BlockSparseWeight):
    """A convolution's weight in the layout `BlockSparse`, of any number, for `ops.bsr_conv2d`.

    Its inputs are in the order kernel row, kernel column, channel, as an image of the memory format
    channels_last has them; each has blocks of its own, unless the kernel is 1×1.
    """

    op = "bsr_conv2d"

    def _matrix(self, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
        rows, columns = self._block
        if math.prod(weight.shape[2:]) > 1:
            columns = 1
        taps = weight.permute(0, 2, 3, 1)
        if self.groups > 1:
            # One matrix with the inputs of all groups, whose blocks nobody else reads.
            out, *size, inputs = taps.shape
            spread = taps.new_zeros(self.groups, out // self.groups, *size, self.groups, inputs)
            for group, part in enumerate(taps.tensor_split(self.groups)):
                spread[group, ..., group, :] = part
            taps = spread.flatten(0, 1)
        return taps.flatten(1), (rows, columns)


class BlockSparseInt8Weight(Int8Weight):
    """A weight in the layout `BlockSparse` of row-wise symmetric 8-bit integers, for
    `ops.bsr_int8_linear`.

    Its arguments: the codes of the stored blocks as `ops.bsr_int8_linear_pack` lays them out, their
    indices, ``scales`` float32 ``[out]``, ``sums`` int32 ``[out]`` and the order of
    `BlockSparseWeight`.
    """

    op = "bsr_int8_linear"
    rows_together = 0
    arguments = ("values", "crow_indices", "col_indices", "scales", "sums", "row_order")

    @classmethod
    def refusal(cls, layout: Layout, number: Number, shape: tuple[int, ...]) -> str | None:
        return _other_layout(cls.op, layout) or super().refusal(layout, number, shape)

    def _form(self) -> None:
        return None

    def _pack(
        self, codes: Tensor, params: dict[str, Tensor], out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        rows, columns = Layout.from_spec(self._spec["layout"]).block
        # The op multiplies four inputs at once.
        block = (rows, columns if columns % 4 == 0 else 4)
        *kernel, sums = _blocks(ops.bsr_int8_linear_pack, codes, block)
        order = _row_order(self, codes.shape, *kernel)
        return *kernel, row_scales(params, len(codes)), sums, order


class _BlockSparse(Activating):
    """What block-sparse layers share: how much of the weight they hold, and what that costs."""

    @property
    def block_density(self) -> float:
        """Stored entries over all, from 0 to 1."""
        packed = self.packed_weight.packed()
        stored = packed.layout.stored(packed.shape, packed.meta)
        return min(1.0, stored / max(1, math.prod(packed.shape)))

    def with_blocks(self, op: Callable[..., Tensor], input: Tensor, *options: Any) -> Tensor:
        """As `with_weight`, of an op whose last argument is the order of the rows of blocks."""
        count = len(self.weight_type.arguments) - 1

        def call(input: Tensor, *arguments: Any) -> Tensor:
            weight, row_order = arguments[:count], arguments[count]
            return op(input, *weight, *arguments[count + 1 :], row_order)

        return self.with_weight(call, input, *options)

    def hollow(self) -> PackedModule:
        """A layer like this one with no block at all: it takes the time that all others have in
        common with it."""
        packed = self.packed_weight.packed()
        zeros = torch.zeros(packed.shape, dtype=packed.dtype, device=self.packed_weight.device)
        empty = PackedTensor.pack(zeros, packed.layout, packed.number, lossy=True)
        new = type(self).from_module(self, empty, self.residency)
        new.input_quantizer = self.input_quantizer
        return new


class BlockSparseLinear(_BlockSparse, KernelLinear):
    """`torch.nn.Linear` on a block-sparse weight of any number.

    Runs `ops.bsr_linear`, which multiplies the stored blocks alone, decoded, in the dtype of the
    layer; no dense copy is kept. The result differs from the float layer's by the order of its
    sums. An Inf or NaN of the input does not reach outputs that have no block there. ``weight``
    decodes the dense weight on each access. Under autocast the input is cast as `Linear` casts it,
    and so is the result. Differentiable with respect to the input and the bias.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Args:
        activation: see `Activating`.

    Shape: input ``[..., in_features]`` float32, float16 or bfloat16, output
    ``[..., out_features]``.
    """

    weight_type = BlockSparseWeight
    layout = BlockSparse()

    def forward(self, input: Tensor) -> Tensor:
        options = self.out_features, self.bias, self.computed()
        return self.with_blocks(ops.bsr_linear, self.taken(input), *options)


class BlockSparseInt8Linear(_BlockSparse, KernelLinear):
    """`torch.nn.Linear` as W8A8 on a block-sparse weight ``Int(bits=8)`` per row.

    Runs `ops.bsr_int8_linear`: activations are quantized row by row to their own range, and the
    stored blocks alone are multiplied. The result differs from the float layer by the rounding of
    weight and activations; a row of the input that holds NaN or Inf gives a row of NaN. ``weight``
    decodes the dense weight on each access. Under autocast the input is cast as `Linear` casts it,
    and so is the result. Differentiable with respect to the input and the bias.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Args:
        activation: see `Activating`.

    Shape: input ``[..., in_features]`` float32, float16 or bfloat16, output
    ``[..., out_features]``.
    """

    weight_type = BlockSparseInt8Weight
    layout = BlockSparse()

    def forward(self, input: Tensor) -> Tensor:
        quantization = None, None, True
        options = self.bias, self.computed(), *quantization
        return self.with_blocks(ops.bsr_int8_linear, self.taken(input), *options)


class BlockSparseConv2d(_BlockSparse, ConvModule):
    """`torch.nn.Conv2d` on a block-sparse weight of any number.

    Runs `ops.bsr_conv2d`, which on a CPU reads windows of the input in place; the result has the
    memory format channels_last where input or weight do. Blocks of one input, as
    ``BlockSparse(block=(16, 1))``, lose nothing here: of a larger kernel every input of a block is
    one of its own. As `BlockSparseLinear` in all else.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Args:
        activation: see `Activating`.

    Shape: input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]`` float32, float16 or bfloat16.
    """

    source = nn.Conv2d
    dimensions = 2
    weight_type = BlockSparseConvWeight
    layout = BlockSparse((16, 1))
    op = "bsr_conv2d"

    def __init__(self, module: nn.Module, weight: BlockSparseConvWeight, **settings: Any) -> None:
        super().__init__(module, weight, **settings)
        self.packed_weight = weight.for_groups(self.groups)

    def forward(self, input: Tensor) -> Tensor:
        input = self.taken(input)
        images = input if input.dim() == 4 else input.unsqueeze(0)
        wanted = memory_format(images)
        if self.packed_weight.channels_last:
            wanted = torch.channels_last
        left, right, top, bottom = around = self._reversed_padding_repeated_twice
        padding = (top, left)
        if self.padding_mode != "zeros" or padding != (bottom, right):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            images, padding = F.pad(images, around, mode=mode), (0, 0)
        output = self.with_blocks(
            ops.bsr_conv2d,
            images.contiguous(memory_format=wanted),
            *(self.out_channels, self.kernel_size, self.bias),
            *(self.stride, padding, self.dilation),
            self.computed(),
        )
        # Of one channel, the input is in both formats.
        output = output.contiguous(memory_format=wanted)
        return output if input.dim() == 4 else output.squeeze(0)


def _blocks(
    pack: Callable[..., tuple[Tensor, ...]], matrix: Tensor, block: tuple[int, int]
) -> tuple[Tensor, ...]:
    """The blocks of ``matrix`` that hold anything but 0 as ``pack`` makes them."""
    if matrix.is_meta:
        # Nothing is known of the blocks; the shape of a result does not depend on them.
        rows = -(-matrix.shape[0] // block[0])
        crow, columns = (matrix.new_empty(n, dtype=torch.int32) for n in (rows + 1, 0))
        sums = matrix.new_empty(matrix.shape[0], dtype=torch.int32)
        kernel = (matrix.new_empty(0, *block), crow, columns)
        return kernel if matrix.is_floating_point() else (*kernel, sums)
    return pack(*ops.bsr_from_dense(matrix, block), *matrix.shape)


def _row_order(
    weight: KernelWeight,
    shape: tuple[int, ...],
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
) -> Tensor | None:
    """In which order the kernel shall take the rows of blocks. Finding one takes longer than a
    layer's call: a weight that is packed for each call has none."""
    if weight.residency == "packed" or not _takes_order(values):
        return None
    block = block_size_of(values)
    return ops.bsr_row_order(crow_indices, col_indices, block, *shape)


def _takes_order(values: Tensor) -> bool:
    """Whether the kernel for such blocks has tiles of several rows."""
    return values.is_cuda and refusal(values, values.dtype) is None


def _other_layout(op: str, layout: Layout) -> str | None:
    fits = isinstance(layout, BlockSparse)
    return None if fits else f"{op} needs a weight in the layout BlockSparse, got {layout}"
