"""Linear layers whose factors run one after the other on integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from compressops import ops
from compressops.formats import Dense, Int, Layout, Number, PackedTensor, Ternary
from compressops.nn.kernel_weight import (
    Int4Weight,
    Int8Weight,
    KernelWeight,
    TernaryWeight,
    group_size,
)
from compressops.nn.lowrank import LowRankLinear, LowRankWeight
from compressops.nn.weight import as_bytes, outside_graphs


class Operand(NamedTuple):
    """A factor as an op takes it.

    Attributes:
        kind: what holds a weight of such a number.
        rows: of the factor.
        group_size: the columns that share a scale; ``None``: all.
    """

    kind: type[KernelWeight]
    rows: int
    group_size: int | None

    def product(
        self, x: Tensor, arguments: tuple[Tensor | None, ...], bias: Tensor | None = None
    ) -> Tensor:
        """``x`` times the factor's transpose, by the op of its number, and the bias."""
        if self.kind is Int8Weight:
            return ops.int8_linear(x, *arguments, bias)
        arguments = (*arguments, self.rows, self.group_size, bias)
        if self.kind is TernaryWeight:
            return ops.ternary_linear(x, *arguments)
        # As `Int4Linear` does.
        return ops.int4_linear(x, *arguments, quantize_x=x.device.type == "cpu")


class LowRankIntegerWeight(LowRankWeight):
    """A low-rank weight of a linear layer whose factors are integers, each held in the form of the
    op of its own number.

    Raises:
        ValueError: the layout is not `LowRank`, or a factor is of numbers that no op has.
    """

    @classmethod
    def refusal(
        cls, layout: Layout, numbers: Sequence[Number], shape: tuple[int, ...]
    ) -> str | None:
        """Why no op can compute with such factors, for a message; ``None``: they can.

        Args:
            numbers: of the factors, in the order of the layout's ``names``; or of all of them.
        """
        shapes = layout.factor_shapes(shape).items()
        numbers = numbers if len(numbers) > 1 else (*numbers, *numbers)
        for (name, size), number in zip(shapes, numbers, strict=True):
            kind = kind_of(number)
            if kind is None:
                return f"it needs Int or Ternary, got {number} of factor {name}"
            if (why := kind.refusal(Dense(), number, size)) is not None:
                return f"{why} of factor {name}"
        return None

    def _set_packed(self, packed: PackedTensor) -> None:
        super()._set_packed(packed)
        factors = packed.factors()
        numbers = [factor.number for factor in factors]
        if (why := self.refusal(packed.layout, numbers, packed.shape)) is not None:
            raise ValueError(f"weight: {why}")
        self.operands = [
            Operand(kind_of(f.number), f.shape[0], group_size(f.number, f.shape[1]))
            for f in factors
        ]

    def _resident(self) -> tuple[str, ...]:
        return tuple(
            f"{name}_kernel_{argument}"
            for name, operand in zip(self.layout.names, self.operands, strict=True)
            for argument in operand.kind.arguments
        )

    def _materialize(self) -> None:
        # Of a residency or of parts that there were before.
        self._holders: tuple[PackedTensor, list[KernelWeight]] | None = None
        for name in [name for name in self._buffers if "_kernel_" in name]:
            # Of a weight that was loaded: it may have other arguments than the one before.
            self._buffers.pop(name)
        if self.residency != "decoded":
            return
        values = [value for kernel in self._decode_kernels() for value in kernel]
        for name, value in zip(self._resident(), values, strict=True):
            if value is not None:
                self.register_buffer(name, value, persistent=False)

    @outside_graphs
    def _decode_kernels(self) -> list[tuple[Tensor | None, ...]]:
        if self._probe.device.type == "meta":
            # Parts without values cannot be checked.
            parts = {name: self._buffers[name] for name in self._parts}
            packed = replace(PackedTensor.describe(self._spec), parts=parts)
        else:
            packed = self.packed()
        return [
            operand.kind(factor, "packed").kernel()
            for operand, factor in zip(self.operands, packed.factors(), strict=True)
        ]

    def _moved(self, fn: Callable[[Tensor], Tensor], resident: Tensor) -> Tensor:
        return as_bytes(fn, resident)

    def _stays_valid(self, before: Tensor, after: Tensor) -> bool:
        return before.device.type == after.device.type

    def factors(self) -> dict[str, Tensor]:
        return self._decode_factors()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` times the transposes of v and u, and the bias. Kernels that are not kept are made
        one after the other in the memory that all packed weights share."""
        u, v = self.operands
        if not self.keeps_none():
            kernels = self.kernels()
            return u.product(v.product(x, kernels[1]), kernels[0], bias)
        packed = self.packed()
        if self._holders is None or self._holders[0] is not packed:
            factors = zip(self.operands, packed.factors(), strict=True)
            self._holders = packed, [one.kind(factor, "packed") for one, factor in factors]
        first, second = reversed(self._holders[1])
        inner = first.run(lambda x, *kernel: v.product(x, kernel), x)
        return second.run(lambda x, *kernel: u.product(x, kernel, bias), inner)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_holders": None}

    def kernels(self) -> list[tuple[Tensor | None, ...]]:
        """Of u and v: the weight as its op takes it."""
        if self.residency != "decoded":
            return self._decode_kernels()
        held = [self._buffers.get(name) for name in self._resident()]
        count = len(self.operands[0].kind.arguments)
        return [tuple(held[:count]), tuple(held[count:])]


class LowRankIntegerLinear(LowRankLinear):
    """`torch.nn.Linear` whose weight is u ``[out_features, r]`` @ v ``[r, in_features]``, both of
    integers, as two products of integers.

    Runs the op of v's number, and that of u's on its result: `ops.int8_linear` for ``Int(bits=8)``
    per row, `ops.int4_linear` for 2 to 4 bits, `ops.ternary_linear` for ``Ternary``. The rows of
    each input are quantized to their own range (those of `ops.int4_linear` on a CPU alone). The
    result differs from the float layer's by the rounding of the factors and of both inputs; a row
    of the input that holds NaN or Inf gives a row of NaN where it is quantized. ``weight`` is the
    product of the factors, multiplied out on each access. Under autocast the input is cast as
    `Linear` casts it, and so is the result.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    weight_type = LowRankIntegerWeight

    @property
    def op(self) -> str:
        """The op that gives the result, of u's number."""
        return self.packed_weight.operands[0].kind.op

    def assumed_faster(self) -> str | None:
        """Two calls instead of one: fewer products alone are not enough without a kernel."""
        return None if self.backend() == "eager" else super().assumed_faster()

    def forward(self, input: Tensor) -> Tensor:
        return self.packed_weight.multiply(self.taken(input), self.bias)


def kind_of(number: Number) -> type[KernelWeight] | None:
    """What holds a weight of integers for the op that multiplies them; ``None``: no op does."""
    if isinstance(number, Ternary):
        return TernaryWeight
    if not isinstance(number, Int):
        return None
    return Int4Weight if number.bits <= 4 else Int8Weight
