"""Argument checks that the launchers share. Needs no triton."""

from __future__ import annotations

import torch


def require(condition: bool, op: str, argument: str, requirement: str, value: object) -> None:
    """Raise the ``ValueError`` that names op, argument, requirement and value, unless it holds."""
    if condition:
        return
    if isinstance(value, torch.Tensor):
        value = f"a tensor of dtype {value.dtype}, shape {list(value.shape)} on {value.device}"
    raise ValueError(f"{op}: argument '{argument}' must be {requirement}, got {value}")
