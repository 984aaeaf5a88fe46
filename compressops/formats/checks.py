"""Checks of what goes into a packed tensor, and of what a file says it is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compressops.formats.number import FLOAT_DTYPES
from compressops.formats.registry import check_choice, check_int

MAX_DIMENSIONS = 16
MAX_DIMENSION = 2**40
SPEC_KEYS = {"shape", "dtype", "layout", "number", "coding", "meta", "parts"}


def check_spec(spec: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a packed tensor's spec, if it has the right keys of the right types.

    Raises:
        ValueError: which names the key and its value.
    """
    if not isinstance(spec, dict) or set(spec) != SPEC_KEYS:
        got = sorted(spec) if isinstance(spec, dict) else spec
        raise ValueError(f"a packed tensor's spec has {sorted(SPEC_KEYS)}, got {got!r}")
    shape = spec["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"shape must be a list of at most {MAX_DIMENSIONS}, got {shape!r}")
    for size in shape:
        check_int("shape", f"each of {shape}", size, 0, MAX_DIMENSION)
    # Zeros left out: torch multiplies strides, which must not overflow for an empty tensor either.
    if math.prod(max(1, size) for size in shape) > 2**62:
        raise ValueError(f"shape {shape} is too large")
    for key in ("meta", "parts"):
        if not isinstance(spec[key], dict):
            raise ValueError(f"{key} must be an object, got {spec[key]!r}")
    dtype = check_choice("spec", "dtype", spec["dtype"], tuple(FLOAT_DTYPES))
    return tuple(shape), FLOAT_DTYPES[dtype]


def check_mask(weight: Tensor, mask: Tensor) -> None:
    """Raise a ``ValueError`` unless ``mask`` is bool, of the weight's shape, and true wherever
    the weight is not 0."""
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask must be bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    if bad := int((~mask & (weight != 0)).sum()):
        raise ValueError(f"{bad} entries of the weight are not 0 where the mask prunes them")


def bits_of(x: Tensor) -> Tensor:
    """The bit patterns of floats, as integers of their size."""
    x = x.contiguous()
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check_same_bits(weight: Tensor, values: Tensor, what: object) -> None:
    """Raise a ``ValueError`` unless ``values`` are those of ``weight`` bit for bit."""
    different = bits_of(weight) != bits_of(values)
    if count := int(different.sum()):
        first = tuple(different.nonzero()[0].tolist())
        raise ValueError(
            f"weight {list(weight.shape)} is not on the grid of {what}: {count} of "
            f"{weight.numel()} values would change, the first at {list(first)} from "
            f"{weight[first].item()!r} to {values[first].item()!r}; lossy=True allows it"
        )
