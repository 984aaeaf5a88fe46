"""What stands in the place of an activation that the layer before it computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compressops.nn.quantized_linear import fusable


class Fused(nn.Module):
    """An activation whose result the linear layer before it gives already: returns its input.

    `convert` puts it there, so that the modules of a model keep their names and the one that calls
    layer and activation in turn stays as it is. It has no parameters and no state.

    Args:
        activation: ``"relu"`` or ``"gelu"``.

    Raises:
        ValueError: it is neither.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        if fusable("activation", activation) is None:
            raise ValueError("activation must be 'relu' or 'gelu', got None")
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return input

    def get_config(self) -> dict[str, Any]:
        """The JSON values that a file keeps of it."""
        return {"type": type(self).__name__, "activation": self.activation}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Fused:
        """Build from `get_config()`; raises ``ValueError`` for anything else."""
        if set(config) != {"type", "activation"}:
            raise ValueError(
                f"config of Fused: expected the keys ['activation', 'type'], got {sorted(config)}"
            )
        return cls(config["activation"])

    def plain(self) -> nn.Module:
        """A module that computes the activation."""
        return nn.ReLU() if self.activation == "relu" else nn.GELU()

    def extra_repr(self) -> str:
        return f"{self.activation}, computed by the layer before"
