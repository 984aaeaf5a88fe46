"""What the ops share: argument checks, the fused activations, the gradient of a bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("none", "relu", "gelu")


def message(op: str, argument: str, requirement: str, value: object) -> str:
    """The text of a ``ValueError``: op, argument, what it must be, and what it is."""
    if isinstance(value, torch.Tensor):
        text = f"a tensor of dtype {value.dtype}, shape {list(value.shape)} on {value.device}"
        if value.layout == torch.strided and not value.is_contiguous():
            text += f", strides {list(value.stride())}"
        value = text
    return f"{op}: argument '{argument}' must be {requirement}, got {value}"


def require(condition: bool, op: str, argument: str, requirement: str, value: object) -> None:
    """Raise the ``ValueError`` of :func:`message` unless the condition holds."""
    if not condition:
        raise ValueError(message(op, argument, requirement, value))


def version(tensor: torch.Tensor) -> int:
    """Rises with each write to the tensor; inference tensors count none."""
    return 0 if tensor.is_inference() else tensor._version


def activate(y: torch.Tensor, activation: str) -> torch.Tensor:
    """One of ``ACTIVATIONS`` of a tensor, element by element."""
    if activation == "relu":
        return y.relu()
    return F.gelu(y) if activation == "gelu" else y


def bias_gradient(grad: torch.Tensor, dims: int | tuple[int, ...], bias: torch.Tensor):
    """The sum of ``grad`` over ``dims`` as ``bias`` is, added up in float32 or wider: a sum may be
    more than float16 holds.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(dims, dtype=wide).to(bias.dtype)
