"""Linear layers that hold packed weights: run dense, or as 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import backends, ops
from compressops.formats import Int, PackedTensor
from compressops.nn.base import PackedModule
from compressops.nn.weight import PackedWeight, as_bytes, decode, outside_graphs


class PackedLinear(PackedModule):
    """`torch.nn.Linear` with a packed weight ``[out_features, in_features]``.

    Runs the dense kernel on the decoded weight: bit for bit the result of a `Linear` that holds
    ``packed.unpack()``.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    source = nn.Linear
    options = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantize_input(input), self.weight, self.bias)


class Int8Weight(PackedWeight):
    """A weight of row-wise symmetric 8-bit integers, kept as the integer kernel reads it.

    Decoded residency holds the int8 codes in the kernel's layout (on a CPU its own blocking, else
    row-major), ``scales`` float32 ``[out]`` and ``sums`` int32 ``[out]``; no dense float copy.
    """

    def __init__(
        self, packed: PackedTensor, residency: str = "decoded", like: Tensor | None = None
    ) -> None:
        if not fits_int8(packed.number):
            raise ValueError(
                f"weight: 8-bit kernels need Int(bits=8, group_size=None, symmetric=True), got "
                f"{packed.number}"
            )
        super().__init__(packed, residency, like)

    def _resident(self) -> tuple[str, ...]:
        return ("kernel_weight", "kernel_scales", "kernel_sums")

    def _materialize(self) -> None:
        if self.residency == "decoded":
            for name, value in zip(self._resident(), self._decode_kernel(), strict=True):
                self.register_buffer(name, value, persistent=False)

    @outside_graphs
    def _decode_kernel(self) -> tuple[Tensor, Tensor, Tensor]:
        device = self._probe.device
        rows, columns = self.shape
        if device.type == "meta":
            return (
                torch.empty(rows, columns, dtype=torch.int8, device=device),
                torch.empty(rows, device=device),
                torch.empty(rows, dtype=torch.int32, device=device),
            )
        packed = self.packed()
        weight, sums = ops.int8_linear_pack(packed.dense_codes(decode=decode).view(rows, columns))
        return weight, packed.params["scales"].reshape(rows), sums

    def _moved(self, fn: Callable[[Tensor], Tensor], resident: Tensor) -> Tensor:
        return as_bytes(fn, resident)

    def _stays_valid(self, before: Tensor, after: Tensor) -> bool:
        # The kernel's layout is the device's; a dtype only concerns the activations.
        return before.device.type == after.device.type

    def forward(self) -> Tensor:
        return self._decode()

    def kernel(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, scales and sums as `ops.int8_linear` takes them."""
        if self.residency == "decoded":
            return self.kernel_weight, self.kernel_scales, self.kernel_sums
        return self._decode_kernel()


class Int8Linear(PackedModule):
    """`torch.nn.Linear` as W8A8: weight ``Int(bits=8)`` per row, activations quantized per row.

    Runs `ops.int8_linear`, with a gradient with respect to the input. The result differs from the
    float layer by the rounding of weight and activations; a row of the input that holds NaN or
    Inf gives a row of NaN. ``weight`` decodes the dense weight on each access. Under autocast the
    input is cast as `Linear` casts it, and so is the result.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    source = nn.Linear
    options = ("in_features", "out_features")
    weight_type = Int8Weight
    op = "int8_linear"

    def forward(self, input: Tensor) -> Tensor:
        weight, scales, sums = self.packed_weight.kernel()
        input = self.autocast(self.quantize_input(input))
        return ops.int8_linear(input, weight, scales, sums, self.bias)

    def backend(self) -> str:
        return backends.name(self.op, self.packed_weight.device.type)


def fits_int8(number: object) -> bool:
    """Whether `ops.int8_linear` and `ops.int8_conv2d` compute with weights of this number."""
    return number == Int(bits=8, group_size=None, symmetric=True)
