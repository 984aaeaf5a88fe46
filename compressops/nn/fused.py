"""Layers that compute the activation after them, and what stands in its place."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from compressops.nn.base import PackedModule
from compressops.nn.weight import PackedWeight
from compressops.ops.checks import ACTIVATIONS

FUSABLE = tuple(name for name in ACTIVATIONS if name != "none")


class Caller:
    """Of a module that calls a layer and `Fused` in turn: whether its ``forward`` runs.

    Both ask it, so that the layer gives what a float layer gives, and `Fused` computes the
    activation, wherever else they are called: an iteration over a ``Sequential``, a use of the
    layer by another module. A list, not a number, because threads that run the same module append
    and pop at once; while one does, the others take it that theirs runs too.
    """

    def __init__(self) -> None:
        self.running: list[bool] = []

    def attach(self, module: nn.Module) -> None:
        """Follow the calls of a module."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self.running.append(True)

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is not called yet.
        return Caller, ()


class Activating(PackedModule):
    """A layer whose op computes an activation at once.

    One that `convert` or `load` gave its activation computes it only within a call of the module
    that calls it and `Fused` in turn (``caller``).

    Args:
        activation: ``"relu"``, ``"gelu"`` (exact) or ``None``, of the layer's output.
    """

    settings = ("activation",)

    def __init__(self, module: nn.Module, weight: PackedWeight, **settings: Any) -> None:
        super().__init__(module, weight, **settings)
        self.activation = fusable("activation", self.activation)
        self.caller: Caller | None = None

    def computed(self) -> str:
        """The activation that the op computes in this call, or ``"none"``."""
        caller = self.caller
        alone = caller is not None and not caller.running
        return "none" if alone else self.activation or "none"


class Fused(nn.Module):
    """An activation whose result the layer before it gives already: returns its input.

    Called on its own, and not by the module that calls the layer too, it computes the activation.

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
        self.caller: Caller | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.caller is None or self.caller.running:
            return input
        return F.relu(input) if self.activation == "relu" else F.gelu(input)

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


def fusable(name: str, value: Any) -> str | None:
    """``value``: an activation that an op computes, or ``None``.

    Raises:
        ValueError: it is none of these.
    """
    if value not in FUSABLE and value is not None:
        raise ValueError(f"{name} must be one of {FUSABLE} or None, got {value!r}")
    return value
