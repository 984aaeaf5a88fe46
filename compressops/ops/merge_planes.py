"""Planes of bytes put together to codes of 16 or 32 bits: the second half of decoding floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends import register
from ..formats.planes import merge_planes_reference
from .checks import require

OP = "merge_planes"


def merge_planes(out: torch.Tensor, planes: Sequence[torch.Tensor], turned: bool = False) -> None:
    """Write codes that are stored by planes of bytes (``docs/FORMAT.md``, section 5).

    ``out[i]`` is given the bits Σ ``planes[p][i]`` · 2^(8p), rotated right by one bit where they
    are ``turned``. All bits are kept, of a float −0.0, denormals and the payload of a NaN too.

    Args:
        out: ``[N]``, contiguous, of any integer or float dtype of 2 or 4 bytes.
        planes: as many as ``out`` has bytes an element: uint8 ``[N]`` each, contiguous, on the
            device of ``out``; the lowest bits first.
        turned: the codes are floats, whose sign is their lowest bit.

    Raises:
        ValueError: an argument is not of that form; ``out`` is as it was then.
    """
    _call(out, list(planes), turned)


def _check(out, planes, turned=False) -> None:
    del turned
    fits = out.dim() == 1 and out.is_contiguous() and out.dtype in DTYPES
    require(fits, OP, "out", "a contiguous vector of 2 or 4 bytes an element", out)
    needed = f"{out.element_size()} tensors for {out.dtype}"
    require(len(planes) == out.element_size(), OP, "planes", needed, len(planes))
    form = f"contiguous torch.uint8 {list(out.shape)} on {out.device}"
    for plane in planes:
        fits = plane.dtype == torch.uint8 and plane.shape == out.shape and plane.is_contiguous()
        require(fits and plane.device == out.device, OP, "planes", form, plane)


DTYPES = {torch.int16, torch.int32, torch.bfloat16, torch.float16, torch.float32}


def _fake(out, planes, turned=False) -> None:
    del out, planes, turned


_call = register(OP, eager=merge_planes_reference, fake=_fake, check=_check)
