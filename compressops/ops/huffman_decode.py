"""Decoding of a length-limited Huffman stream, chunk by chunk in parallel."""

from __future__ import annotations

import torch

from ..backends import register
from ..formats.huffman import MAX_CHUNK_SIZE, huffman_decode_reference
from .checks import require

OP = "huffman_decode"


def huffman_decode(
    stream: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    num_symbols: int,
    chunk_size: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode the symbols of a Huffman stream (format: ``docs/FORMAT.md``, "Huffman").

    Args:
        stream: uint8 ``[B]``, contiguous: the chunks, each with its checksum.
        offsets: int64 ``[chunks + 1]``: where each chunk starts in the stream, and its end.
        lengths: uint8 ``[S]``, S ≤ 256: code length of each symbol, at most 12; 0 = not used.
        num_symbols: how many symbols the stream holds.
        chunk_size: symbols in each chunk but the last, 1 to 32768.
        out: uint8 ``[num_symbols]``, contiguous, on the stream's device: where the symbols go, and
            then what is returned. After an error its contents mean nothing.

    Returns:
        uint8 ``[num_symbols]`` on the stream's device.

    Raises:
        ValueError: an argument is not of that form, the lengths are no complete prefix code, or the
            stream is corrupt (a chunk's CRC is wrong, or its codes do not end exactly where it
            does). Whatever the bytes are, nothing outside the buffers is touched.
    """
    if out is None:
        return _call(stream, offsets, lengths, num_symbols, chunk_size)
    fits = out.dim() == 1 and out.numel() == num_symbols
    require(fits, OP, "out", f"a vector of {num_symbols} symbols", out)
    huffman_decode_out(stream, offsets, lengths, chunk_size, out)
    return out


def huffman_decode_out(
    stream: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """:func:`huffman_decode` of ``out.numel()`` symbols into ``out``, as the op that it is."""
    _call_out(stream, offsets, lengths, chunk_size, out)


def _check(stream, offsets, lengths, num_symbols, chunk_size) -> None:
    for name, tensor, dtype in (
        ("stream", stream, torch.uint8),
        ("offsets", offsets, torch.int64),
        ("lengths", lengths, torch.uint8),
    ):
        fits = tensor.dtype == dtype and tensor.dim() == 1 and tensor.is_contiguous()
        require(fits, OP, name, f"a contiguous {dtype} vector", tensor)
        require(
            tensor.device == stream.device, OP, name, f"on {stream.device}, as stream is", tensor
        )
    require(lengths.numel() <= 256, OP, "lengths", "at most 256 long", lengths.numel())
    fits = 1 <= chunk_size <= MAX_CHUNK_SIZE
    require(fits, OP, "chunk_size", f"from 1 to {MAX_CHUNK_SIZE}", chunk_size)
    bits = 8 * stream.numel()
    fits = 0 <= num_symbols <= bits
    require(fits, OP, "num_symbols", f"between 0 and the {bits} bits of stream", num_symbols)
    entries = -(-num_symbols // chunk_size) + 1
    form = f"of {entries} entries (one a chunk, and the end)"
    require(offsets.numel() == entries, OP, "offsets", form, offsets.numel())


def _fake(stream, offsets, lengths, num_symbols, chunk_size) -> torch.Tensor:
    return stream.new_empty((num_symbols,))


def _eager(stream, offsets, lengths, num_symbols, chunk_size) -> torch.Tensor:
    try:
        return huffman_decode_reference(stream, offsets, lengths, num_symbols, chunk_size)
    except ValueError as error:
        raise ValueError(f"huffman_decode: {error}") from None


def _check_out(stream, offsets, lengths, chunk_size, out) -> None:
    _check(stream, offsets, lengths, out.numel(), chunk_size)
    fits = out.dtype == torch.uint8 and out.dim() == 1 and out.is_contiguous()
    require(fits, OP, "out", "a contiguous torch.uint8 vector", out)
    require(out.device == stream.device, OP, "out", f"on {stream.device}, as stream is", out)


def _fake_out(stream, offsets, lengths, chunk_size, out) -> None:
    pass


def _eager_out(stream, offsets, lengths, chunk_size, out) -> None:
    out.copy_(_eager(stream, offsets, lengths, out.numel(), chunk_size))


_call = register(OP, eager=_eager, fake=_fake, check=_check)
_call_out = register("huffman_decode_out", eager=_eager_out, fake=_fake_out, check=_check_out)
