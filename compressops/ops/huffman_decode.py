"""Decoding of a canonical, length-limited Huffman stream, chunk by chunk in parallel."""

from __future__ import annotations

import torch

from ..backends import register
from ..formats.huffman import MAX_CHUNK_SIZE, huffman_decode_reference


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
    if out.dim() != 1 or out.numel() != num_symbols:
        _fail("out", f"a vector of {num_symbols} symbols", list(out.shape))
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
        if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
            _fail(name, f"a contiguous {dtype} vector", f"{tensor.dtype} {list(tensor.shape)}")
        if tensor.device != stream.device:
            _fail(name, f"on {stream.device}, as stream is", tensor.device)
    if lengths.numel() > 256:
        _fail("lengths", "at most 256 long", lengths.numel())
    if not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        _fail("chunk_size", f"from 1 to {MAX_CHUNK_SIZE}", chunk_size)
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


def _check_out(stream, offsets, lengths, chunk_size, out) -> None:
    _check(stream, offsets, lengths, out.numel(), chunk_size)
    if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous():
        _fail("out", "a contiguous torch.uint8 vector", f"{out.dtype} {list(out.shape)}")
    if out.device != stream.device:
        _fail("out", f"on {stream.device}, as stream is", out.device)


def _fake_out(stream, offsets, lengths, chunk_size, out) -> None:
    pass


def _eager_out(stream, offsets, lengths, chunk_size, out) -> None:
    out.copy_(_eager(stream, offsets, lengths, out.numel(), chunk_size))


_call = register("huffman_decode", eager=_eager, fake=_fake, check=_check)
_call_out = register("huffman_decode_out", eager=_eager_out, fake=_fake_out, check=_check_out)
