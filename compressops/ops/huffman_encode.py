"""Encoding of symbols as a canonical Huffman stream, chunk by chunk in parallel."""

from __future__ import annotations

import torch

from ..backends import register
from ..formats.huffman import MAX_CHUNK_SIZE, huffman_encode_reference


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
    if symbols.dtype != torch.uint8 or symbols.dim() != 1:
        _fail("symbols", "a torch.uint8 vector", f"{symbols.dtype} {list(symbols.shape)}")
    fits = lengths.dtype == torch.uint8 and lengths.dim() == 1 and lengths.is_contiguous()
    if not fits or lengths.numel() > 256:
        form = "a contiguous torch.uint8 vector of at most 256"
        _fail("lengths", form, f"{lengths.dtype} {list(lengths.shape)}")
    if lengths.device != symbols.device:
        _fail("lengths", f"on {symbols.device}, as symbols are", lengths.device)
    if not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        _fail("chunk_size", f"from 1 to {MAX_CHUNK_SIZE}", chunk_size)


def _fail(argument: str, requirement: str, value: object) -> None:
    raise ValueError(f"huffman_encode: argument '{argument}' must be {requirement}, got {value}")


def _fake(symbols, lengths, chunk_size) -> tuple[torch.Tensor, torch.Tensor]:
    del lengths
    chunks = (symbols.shape[0] + chunk_size - 1) // chunk_size
    nbytes = torch.library.get_ctx().new_dynamic_size()
    return symbols.new_empty((nbytes,)), symbols.new_empty((chunks + 1,), dtype=torch.int64)


def _eager(symbols, lengths, chunk_size) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return huffman_encode_reference(symbols, lengths, chunk_size)
    except ValueError as error:
        raise ValueError(f"huffman_encode: {error}") from None


_call = register("huffman_encode", eager=_eager, fake=_fake, check=_check)
