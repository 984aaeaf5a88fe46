"""Linear layers that hold packed weights and run the dense kernel, and what those share that run
an op on integers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from compressops.nn.base import PackedModule


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
        return self.with_weight(F.linear, self.quantize_input(input), self.bias)


class KernelLinear(PackedModule):
    """A linear layer that runs the op of its `KernelWeight`, with a gradient with respect to the
    input."""

    source = nn.Linear
    options = ("in_features", "out_features")

    @property
    def op(self) -> str:
        """The op that runs instead of the dense kernel."""
        return self.weight_type.op
