"""Packed weights that are kept as the kernel of an op reads them, with no dense float copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressops import ops
from compressops.formats import Int, Layout, LowRank, Number, PackedTensor, Ternary
from compressops.formats.rows import row_blocks
from compressops.nn.weight import PackedWeight, as_bytes, outside_graphs
from compressops.ops.huge_pages import empty_to_keep
from compressops.ops.int4_linear import CODES as INT4
from compressops.ops.int8_linear import MAX_IN_FEATURES, packed_shape
from compressops.ops.packed_linear import GROUP_MULTIPLE
from compressops.ops.ternary_linear import CODES as TERNARY


class KernelWeight(PackedWeight):
    """A weight that an op multiplies with in a form of its own, mostly as integer codes.

    Decoded residency holds what the op's packing makes of it (on a CPU its own blocking),
    packed residency packs anew on each use, on a CPU into memory that all packed weights share. A
    subclass names the op and the arguments that `_pack` gives, and says which numbers the op
    computes with.

    Raises:
        ValueError: the op has no such weight; the message says what it needs.
    """

    keeps_floats = False
    op: ClassVar[str]
    # Of so many rows the form is made without the others on a CPU; 0: of the whole weight alone.
    rows_together: ClassVar[int] = 0
    arguments: ClassVar[tuple[str, ...]]
    # The buffers that hold them, named once: a small layer's call is short.
    _argument_buffers: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._argument_buffers = tuple(f"kernel_{name}" for name in getattr(cls, "arguments", ()))

    @classmethod
    def needs(cls, number: Number, columns: int) -> str | None:
        """What the op needs of a number and is not there, for a message; ``None``: nothing."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, layout: Layout, number: Number, shape: tuple[int, ...]) -> str | None:
        """Why the op cannot compute with such a weight, for a message; ``None``: it can."""
        columns = math.prod(shape[1:])
        if isinstance(layout, LowRank):
            return f"{cls.op} needs a weight of one matrix, got {layout}"
        if (needed := cls.needs(number, columns)) is not None:
            return f"{cls.op} needs {needed}, got {number}"
        if columns > MAX_IN_FEATURES:
            return f"{cls.op} needs at most {MAX_IN_FEATURES} inputs (int32 sums), got {columns}"
        return None

    def _pack(
        self, codes: Tensor, params: dict[str, Tensor], out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """The op's arguments from int8 codes ``[rows, columns]`` and the number's parameters, the
        first of them in ``out`` if that is given."""
        raise NotImplementedError

    @property
    def _sides(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])

    def _form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of the first argument where they don't depend on the codes."""
        return None

    def _set_packed(self, packed: PackedTensor) -> None:
        why = self.refusal(packed.layout, packed.number, packed.shape)
        if why is not None:
            raise ValueError(f"weight: {why}")
        super()._set_packed(packed)
        self.group_size = group_size(packed.number, math.prod(packed.shape[1:]))

    def _resident(self) -> tuple[str, ...]:
        return self._argument_buffers

    def _materialize(self) -> None:
        if self.residency != "decoded":
            return
        for name, value in zip(self._resident(), self._decode_kernel(), strict=True):
            # Of a weight that was loaded: it may have fewer arguments than the one before.
            self._buffers.pop(name, None)
            if value is not None:
                self.register_buffer(name, value, persistent=False)

    @outside_graphs
    def _decode_kernel(self) -> tuple[Tensor | None, ...]:
        device = self._probe.device
        if device.type == "meta":
            codes = torch.empty(self.shape, dtype=torch.int8, device=device)
            shapes = Number.from_spec(self._spec["number"]).param_shapes(tuple(self.shape))
            params = {
                name: torch.empty(size, dtype=dtype, device=device)
                for name, (dtype, size) in shapes.items()
            }
        elif device.type == "cpu" and self.rows_together:
            return self._packed_in_blocks()
        else:
            packed = self.packed()
            codes, params = packed.dense_codes(ops.DECODER), packed.params
        return self._pack(codes.flatten(1), params)

    def _packed_in_blocks(
        self, out: Tensor | None = None, memory: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Some rows at a time: codes of a byte each take more than both packed forms."""
        packed = self.packed()
        count, params = self.shape[0], packed.params
        whole: list[_Growing | None] = []
        for rows, codes in row_blocks(packed, self.rows_together, ops.DECODER, memory):
            if len(codes) == count:
                return self._pack(codes, params, out)
            some = {name: p if p.shape[0] == 1 else p[rows] for name, p in params.items()}
            block = self._pack(codes, some)
            if not whole:
                blocks, places = -(-count // len(codes)), (out, *(len(block) - 1) * [None])
                whole = [
                    None if part is None else _Growing(part, blocks, place)
                    for part, place in zip(block, places, strict=True)
                ]
            for growing, part in zip(whole, block, strict=True):
                if growing is not None:
                    growing.append(part)
        return tuple(None if growing is None else growing.tensor() for growing in whole)

    def _moved(self, fn: Callable[[Tensor], Tensor], resident: Tensor) -> Tensor:
        return as_bytes(fn, resident)

    def _stays_valid(self, before: Tensor, after: Tensor) -> bool:
        # The kernel's layout is the device's; a dtype only concerns the activations.
        return before.device.type == after.device.type

    def forward(self) -> Tensor:
        return self._decode()

    def kernel(self) -> tuple[Tensor | None, ...]:
        """The weight as the op takes it: `arguments`, ``None`` for one that this weight lacks."""
        if self.residency == "decoded":
            buffer = self._buffers.get
            return tuple([buffer(name) for name in self._argument_buffers])
        return self._decode_kernel()

    def _shared_nbytes(self) -> int:
        form = self._form() if self.device.type == "cpu" else None
        return 0 if form is None else _padded_size(form) + self.shape.numel()

    def _decode_into(self, buffer: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = form = self._form()
        out = buffer[: math.prod(shape)].view(dtype).view(shape)
        codes = buffer[_padded_size(form) :].view(torch.int8).view(self.shape)
        return self._packed_in_blocks(out, codes)


class Int8Weight(KernelWeight):
    """A weight of row-wise symmetric 8-bit integers for `ops.int8_linear`.

    Its arguments: the int8 codes in the kernel's layout, ``scales`` float32 ``[out]`` and ``sums``
    int32 ``[out]``.
    """

    op = "int8_linear"
    rows_together = 16
    arguments = ("weight", "scales", "sums")

    @classmethod
    def needs(cls, number: Number, columns: int) -> str | None:
        fits = number == Int(bits=8, group_size=None, symmetric=True)
        return None if fits else "Int(bits=8, group_size=None, symmetric=True)"

    def _form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        return packed_shape(*self._sides, self.device), torch.int8

    def _pack(
        self, codes: Tensor, params: dict[str, Tensor], out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        weight, sums = ops.int8_linear_pack(codes, out)
        # A copy: of a mapped file the pages around the scales would stay in memory with them.
        return weight, row_scales(params, len(codes)).clone(), sums


class Int4Weight(KernelWeight):
    """A weight of integers of at most 4 bits for `ops.int4_linear`.

    Its arguments: two codes a byte in the kernel's layout, ``scales`` and, unless the number is
    symmetric, ``zeros``, as `ops.int4_linear_pack` makes them.
    """

    op = "int4_linear"
    rows_together = 32
    arguments = ("weight", "scales", "zeros")

    @classmethod
    def needs(cls, number: Number, columns: int) -> str | None:
        if not isinstance(number, Int) or number.bits > 4:
            return "Int of 2 to 4 bits"
        return _needed_groups(number, columns)

    def _form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        return INT4.packed_shape(*self._sides, self.device), torch.uint8

    def _pack(
        self, codes: Tensor, params: dict[str, Tensor], out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        zeros = params.get("zeros")
        return ops.int4_linear_pack(codes, params["scales"], zeros, self.group_size, out)


class TernaryWeight(KernelWeight):
    """A weight of −α, 0 and α for `ops.ternary_linear`, and for look-ups of its rows.

    Its arguments: four codes a byte in the kernel's layout, and ``scales``, as
    `ops.ternary_linear_pack` makes them.
    """

    op = "ternary_linear"
    rows_together = 32
    arguments = ("weight", "scales")

    @classmethod
    def needs(cls, number: Number, columns: int) -> str | None:
        return _needed_groups(number, columns) if isinstance(number, Ternary) else "Ternary"

    def _form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        return TERNARY.packed_shape(*self._sides, self.device), torch.uint8

    def _pack(
        self, codes: Tensor, params: dict[str, Tensor], out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        scales, (rows, columns) = params["scales"], codes.shape
        # One α for all is [1, 1], which is also the shape of a single row's only group.
        if scales.shape == (1, 1) and columns:
            scales = scales.reshape(())
        elif not columns:
            scales = scales.new_zeros(rows, 0)
        return ops.ternary_linear_pack(codes, scales, self.group_size, out)


class GroupedWeight(KernelWeight):
    """A convolution's weight, whose form for the op depends on the layer's ``groups``."""

    groups: int | None = None

    def for_groups(self, groups: int) -> GroupedWeight:
        """This weight, or its like where another layer has it in another number of groups."""
        if self.groups not in (None, groups):
            like = torch.empty_strided(
                self.shape, self._strides, dtype=self._probe.dtype, device=self.device
            )
            return type(self)(self.packed(), self.residency, like).for_groups(groups)
        if self.groups is None:
            self.groups = groups
            self._materialize()
        return self

    def _materialize(self) -> None:
        if self.groups is not None:
            super()._materialize()


def row_scales(params: dict[str, Tensor], rows: int) -> Tensor:
    """float32 ``[rows]`` of a number with a scale a row."""
    scales = params["scales"]
    # A row of no inputs has no scale either, and nothing to scale.
    return scales.reshape(-1) if scales.numel() else scales.new_zeros(rows)


def _padded_size(form: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of a tensor of bytes, with what stands behind it on a line of its own."""
    return -(-math.prod(form[0]) // 64) * 64


class _Growing:
    """A tensor of blocks that follow each other in the first dimension, none longer than the
    first; in ``out``, as long as all of them, if that is given."""

    def __init__(self, first: Tensor, blocks: int, out: Tensor | None = None) -> None:
        if out is None:
            flat = empty_to_keep(blocks * first.numel(), first, first.dtype)
            out = flat.view(blocks * len(first), *first.shape[1:])
        self.all, self.end = out, 0

    def append(self, block: Tensor) -> None:
        begin, self.end = self.end, self.end + len(block)
        self.all[begin : self.end] = block

    def tensor(self) -> Tensor:
        return self.all[: self.end]


def group_size(number: Any, columns: int) -> int | None:
    """The inputs that share a scale, ``None`` where they are the whole row."""
    size = getattr(number, "group_size", None)
    return None if size is None or size >= columns else size


def _needed_groups(number: Any, columns: int) -> str | None:
    fits = (group_size(number, columns) or 0) % GROUP_MULTIPLE == 0
    return None if fits else f"a group_size that is a multiple of {GROUP_MULTIPLE}"
