"""Linear layers whose factors run one after the other on integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressops import ops
from compressops.formats import Layout, Number, PackedTensor
from compressops.nn.kernel_weight import Int8Weight, int8_kernel
from compressops.nn.linear import KernelLinear
from compressops.nn.lowrank import LowRankLinear, LowRankWeight
from compressops.nn.weight import as_bytes, outside_graphs


class LowRankInt8Weight(LowRankWeight):
    """A low-rank weight of a linear layer whose factors are row-wise symmetric 8-bit integers, each
    held as `Int8Weight` holds a weight.

    Raises:
        ValueError: the layout is not `LowRank`, or a factor is of other numbers.
    """

    op = Int8Weight.op

    @classmethod
    def refusal(
        cls, layout: Layout, numbers: Sequence[Number], shape: tuple[int, ...]
    ) -> str | None:
        """Why the op cannot compute with such factors, for a message; ``None``: it can.

        Args:
            numbers: of the factors, in the order of the layout's ``names``; or of all of them.
        """
        shapes = layout.factor_shapes(shape).items()
        numbers = numbers if len(numbers) > 1 else (*numbers, *numbers)
        for (name, size), number in zip(shapes, numbers, strict=True):
            if (needed := Int8Weight.needs(number, size[1])) is not None:
                return f"{cls.op} needs {needed}, got {number} of factor {name}"
        return None

    def _set_packed(self, packed: PackedTensor) -> None:
        super()._set_packed(packed)
        numbers = [factor.number for factor in packed.factors()]
        if (why := self.refusal(packed.layout, numbers, packed.shape)) is not None:
            raise ValueError(f"weight: {why}")

    def _resident(self) -> tuple[str, ...]:
        return tuple(f"{name}_kernel_{part}" for name in "uv" for part in Int8Weight.arguments)

    def _materialize(self) -> None:
        if self.residency != "decoded":
            return
        values = [value for kernel in self._decode_kernels() for value in kernel]
        for name, value in zip(self._resident(), values, strict=True):
            self.register_buffer(name, value, persistent=False)

    @outside_graphs
    def _decode_kernels(self) -> list[tuple[Tensor, ...]]:
        device = self._probe.device
        if device.type != "meta":
            found = [(f.dense_codes(ops.DECODER), f.params) for f in self.packed().factors()]
        else:
            found = [
                (
                    torch.empty(shape, dtype=torch.int8, device=device),
                    {"scales": torch.empty(shape[0], 1, device=device)},
                )
                for shape in self.run_shapes().values()
            ]
        return [int8_kernel(codes, params) for codes, params in found]

    def _moved(self, fn: Callable[[Tensor], Tensor], resident: Tensor) -> Tensor:
        return as_bytes(fn, resident)

    def _stays_valid(self, before: Tensor, after: Tensor) -> bool:
        return before.device.type == after.device.type

    def factors(self) -> dict[str, Tensor]:
        return self._decode_factors()

    def kernels(self) -> list[tuple[Tensor, ...]]:
        """Of u and v: the weight as the op takes it."""
        if self.residency != "decoded":
            return self._decode_kernels()
        held = [self._buffers[name] for name in self._resident()]
        count = len(Int8Weight.arguments)
        return [tuple(held[:count]), tuple(held[count:])]


class LowRankInt8Linear(LowRankLinear):
    """`torch.nn.Linear` whose weight is u ``[out_features, r]`` @ v ``[r, in_features]``, both
    ``Int(bits=8)`` per row, as two products of integers (W8A8).

    Runs `ops.int8_linear` with v, and with u on its result: the rows of each input are quantized to
    their own range. The result differs from the float layer's by the rounding of the factors and
    of both inputs; a row of the input that holds NaN or Inf gives a row of NaN. ``weight`` is the
    product of the factors, multiplied out on each access. Under autocast the input is cast as
    `Linear` casts it, and so is the result.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    weight_type = LowRankInt8Weight
    op = KernelLinear.op

    def assumed_faster(self) -> str | None:
        """Two calls instead of one: fewer products alone are not enough without a kernel."""
        return None if self.backend() == "eager" else super().assumed_faster()

    def forward(self, input: Tensor) -> Tensor:
        u, v = self.packed_weight.kernels()
        return ops.int8_linear(ops.int8_linear(self.taken(input), *v), *u, self.bias)
