"""Decoding of a canonical, length-limited Huffman stream, chunk by chunk in parallel."""

from __future__ import annotations

import torch

from ..backends import register
from ..formats.huffman import huffman_decode_reference


def huffman_decode(
    stream: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    num_symbols: int,
    chunk_size: int,
) -> torch.Tensor:
    """Decode the symbols of a Huffman stream (format: ``docs/FORMAT.md``, "Huffman").

    Args:
        stream: uint8 ``[B]``, contiguous: the chunks' bits, lowest bit first.
        offsets: int64 ``[chunks + 1]``: where each chunk starts in the stream, and its end.
        lengths: uint8 ``[S]``, S ≤ 256: code length of each symbol, at most 12; 0 = not used.
        num_symbols: how many symbols the stream holds.
        chunk_size: symbols in each chunk but the last.

    Returns:
        uint8 ``[num_symbols]`` on the stream's device.

    Raises:
        ValueError: an argument is not of that form, the lengths are no complete prefix code, or the
            stream is corrupt (a chunk's codes do not end exactly where the chunk does). Whatever
            the bytes are, nothing outside the buffers is touched.
    """
    return _call(stream, offsets, lengths, num_symbols, chunk_size)


def _check(stream, offsets, lengths, num_symbols, chunk_size) -> None:
    for name, tensor, dtype in (
        ("stream", stream, torch.uint8),
        ("offsets", offsets, torch.int64),
        ("lengths", lengths, torch.uint8),
    ):
        if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
            _fail(name, f"a contiguous {dtype} vector", f"{tensor.dtype} {list(tensor.shape)}")
        if tensor.device != stream.device:
            _fail(name, f"on {stream.device}, as stream is", tensor.device)
    if lengths.numel() > 256:
        _fail("lengths", "at most 256 long", lengths.numel())
    if chunk_size <= 0:
        _fail("chunk_size", "positive", chunk_size)
    if not 0 <= num_symbols <= 8 * stream.numel():
        _fail("num_symbols", f"between 0 and the {8 * stream.numel()} bits of stream", num_symbols)
    chunks = -(-num_symbols // chunk_size)
    if offsets.numel() != chunks + 1:
        _fail("offsets", f"of {chunks + 1} entries (one a chunk, and the end)", offsets.numel())


def _fail(argument: str, requirement: str, value: object) -> None:
    raise ValueError(f"huffman_decode: argument '{argument}' must be {requirement}, got {value}")


def _fake(stream, offsets, lengths, num_symbols, chunk_size) -> torch.Tensor:
    return stream.new_empty((num_symbols,))


def _eager(stream, offsets, lengths, num_symbols, chunk_size) -> torch.Tensor:
    try:
        return huffman_decode_reference(stream, offsets, lengths, num_symbols, chunk_size)
    except ValueError as error:
        raise ValueError(f"huffman_decode: {error}") from None


_call = register("huffman_decode", eager=_eager, fake=_fake, check=_check)
