"""Codes of weights in the panels that a CPU's products of integers read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..backends import register
from .checks import require
from .huge_pages import empty_to_keep

OP = "pack_panels"
PANEL = 32  # outputs, of less than 8 bits
_WIDE, _DEPTH = 16, 4  # outputs of a panel of 8 bits; inputs whose codes lie in the bytes of a word


def pack_panels(
    out: torch.Tensor,
    codes: torch.Tensor,
    bits: int,
    zero: int = 0,
    sums: torch.Tensor | None = None,
) -> None:
    """Write rows of codes as panels: words of some inputs, of outputs side by side.

    ``out`` is ``[panel][tap][word][output]``, N and K zero padded. Panels have 16 outputs of 8
    bits, else 32 (the last 16 where that is enough). A word of 32 bits has 32 / bits inputs of an
    output: its byte i the inputs i, 4 + i, 8 + i, …, the first in the lowest bits.

    Args:
        out: uint8 or int8, contiguous, of any shape: ceil(N / 16) · 16 · taps · ceil(K / (32 /
            bits)) · 4 bytes.
        codes: int8 ``[N, K, taps]``, contiguous.
        bits: 2, 4 or 8, of a stored code.
        zero: added to each code, modulo 2^bits; 0 of 8 bits.
        sums: int32 ``[N]``, contiguous: is given the sum of each row's codes; of 8 bits alone.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    _call(out, codes, bits, zero, sums)


def _check(out, codes, bits, zero=0, sums=None) -> None:
    fits = codes.dtype == torch.int8 and codes.dim() == 3 and codes.is_contiguous()
    require(fits, OP, "codes", "a contiguous int8 tensor [N, K, taps]", codes)
    require(bits in (2, 4, 8), OP, "bits", "2, 4 or 8", bits)
    fits = 0 <= zero < (1 if bits == 8 else 1 << bits)
    require(fits, OP, "zero", "from 0 to 2^bits - 1, 0 of 8 bits", zero)
    N, K, taps = codes.shape
    size = padded_outputs(N) * taps * -(-K // (32 // bits)) * 4
    fits = out.dtype in (torch.uint8, torch.int8) and out.is_contiguous() and out.numel() == size
    fits = fits and out.device == codes.device
    require(fits, OP, "out", f"contiguous, of {size} bytes on {codes.device}", out)
    if sums is not None:
        fits = bits == 8 and sums.dtype == torch.int32 and tuple(sums.shape) == (N,)
        fits = fits and sums.is_contiguous() and sums.device == codes.device
        require(fits, OP, "sums", f"a contiguous int32 [{N}] on {codes.device}, of 8 bits", sums)


def _fake(out, codes, bits, zero=0, sums=None) -> None:
    del out, codes, bits, zero, sums


def _eager(out, codes, bits, zero=0, sums=None) -> None:
    if sums is not None:
        sums.copy_(codes.sum((1, 2), dtype=torch.int32))
    inputs = 32 // bits
    kept = codes if bits == 8 else (codes + zero) & (2**bits - 1)
    rows = F.pad(kept.view(torch.uint8).transpose(1, 2), (0, -codes.shape[1] % inputs))
    words = rows.unflatten(2, (rows.shape[2] // inputs, 8 // bits, _DEPTH)).transpose(3, 4)
    # [N, taps · words, 4]
    flat = joined(words, bits).flatten(1, 2)
    out.view(torch.uint8).view(-1).copy_(to_panels(flat, _WIDE if bits == 8 else PANEL))


def packed_out(
    op: str,
    shape: tuple[int, ...],
    codes: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """``out`` if it is contiguous, of this shape and dtype, where ``codes`` are; for None a new
    one.

    Raises:
        ValueError: it is another one.
    """
    if out is None:
        return empty_to_keep(math.prod(shape), codes, dtype).view(shape)
    fits = out.dtype == dtype and tuple(out.shape) == shape and out.is_contiguous()
    fits = fits and out.device == codes.device
    require(fits, op, "out", f"contiguous {dtype} {list(shape)} on {codes.device}", out)
    return out


def joined(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes from the codes along the last dimension, the first in the lowest bits."""
    shifts = bits * torch.arange(parts.shape[-1], dtype=torch.uint8, device=parts.device)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def padded_outputs(N: int) -> int:
    """Outputs of the panels that hold N."""
    return -(-N // 16) * 16


def to_panels(rows: torch.Tensor, panel: int = PANEL) -> torch.Tensor:
    """``[N, columns, ...]`` flat, as ``[panel][column][output of the panel][...]``."""
    N = padded_outputs(rows.shape[0])
    rows = F.pad(rows, (0,) * (2 * rows.dim() - 1) + (N - rows.shape[0],))
    parts = (rows[: N // panel * panel], rows[N // panel * panel :])
    panels = [
        part.unflatten(0, (len(part) // width, width)).transpose(1, 2).flatten()
        for part, width in zip(parts, (panel, 16), strict=True)
    ]
    return torch.cat(panels)


def from_panels(flat: torch.Tensor, N: int, columns: int, item: int = 1) -> torch.Tensor:
    """The rows ``[N, columns · item]`` that `to_panels` had as ``[N, columns, item]``."""
    padded, size = padded_outputs(N), columns * item
    whole = padded // PANEL
    parts = [
        part.view(panels, columns, width, item).transpose(1, 2).flatten(2)
        for part, panels, width in (
            (flat[: whole * PANEL * size], whole, PANEL),
            (flat[whole * PANEL * size :], (padded - whole * PANEL) // 16, 16),
        )
    ]
    return torch.cat([part.flatten(0, 1) for part in parts])[:N]


_call = register(OP, eager=_eager, fake=_fake, check=_check, prepares=True)
