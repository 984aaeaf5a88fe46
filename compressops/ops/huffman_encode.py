"""Encoding of symbols as a Huffman stream, chunk by chunk in parallel."""

from __future__ import annotations

import torch

from ..backends import register
from ..formats.huffman import MAX_CHUNK_SIZE, huffman_encode_reference
from .checks import require

OP = "huffman_encode"


def huffman_encode(
    symbols: torch.Tensor, lengths: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode symbols as a Huffman stream (format: ``docs/FORMAT.md``, "Huffman").

    The stream is a function of the arguments, byte for byte, whichever backend writes it.

    Args:
        symbols: uint8 ``[N]``, of any stride.
        lengths: uint8 ``[S]``, S ≤ 256, contiguous: code length of each symbol, at most 12; 0 = not
            used. `formats.huffman.huffman_lengths` finds the best.
        chunk_size: symbols in each chunk but the last, 1 to 32768.

    Returns:
        ``(stream, offsets)`` on the symbols' device: uint8 ``[B]``, and int64 ``[chunks + 1]``:
        where each chunk starts in the stream, and its end.

    Raises:
        ValueError: an argument is not of that form, the lengths are no complete prefix code, or a
            symbol has no code.
    """
    return _call(symbols, lengths, chunk_size)


def _check(symbols, lengths, chunk_size) -> None:
    fits = symbols.dtype == torch.uint8 and symbols.dim() == 1
    require(fits, OP, "symbols", "a torch.uint8 vector", symbols)
    fits = lengths.dtype == torch.uint8 and lengths.dim() == 1 and lengths.is_contiguous()
    form = "a contiguous torch.uint8 vector of at most 256"
    require(fits and lengths.numel() <= 256, OP, "lengths", form, lengths)
    same = lengths.device == symbols.device
    require(same, OP, "lengths", f"on {symbols.device}, as symbols are", lengths)
    fits = 1 <= chunk_size <= MAX_CHUNK_SIZE
    require(fits, OP, "chunk_size", f"from 1 to {MAX_CHUNK_SIZE}", chunk_size)


def _fake(symbols, lengths, chunk_size) -> tuple[torch.Tensor, torch.Tensor]:
    del lengths
    chunks = (symbols.shape[0] + chunk_size - 1) // chunk_size
    nbytes = torch.library.get_ctx().new_dynamic_size()
    return symbols.new_empty((nbytes,)), symbols.new_empty((chunks + 1,), dtype=torch.int64)


def _eager(symbols, lengths, chunk_size) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return huffman_encode_reference(symbols, lengths, chunk_size)
    except ValueError as error:
        raise ValueError(f"{OP}: {error}") from None


_call = register(OP, eager=_eager, fake=_fake, check=_check)
