"""Codes wider than a byte, as planes of bytes: plane i holds the bits 8i to 8i + 7 of each code.

The codes of a float are turned first: rotated left by one bit, so that the sign is their lowest
bit and the highest plane the eight bits below the sign. Of bfloat16 and float32 that plane is the
exponent, which is what of a weight's floats can be coded; of float16 it is the exponent and the
three highest bits of the mantissa.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressops.formats.huffman import huffman_decode_reference


def code_dtype(bits: int) -> torch.dtype:
    """Signed integer dtype that holds a code of ``bits`` bits."""
    return torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32


def split_planes(codes: Tensor, bits: int, turned: bool = False) -> list[Tensor]:
    """The planes of ``codes`` (integers ``[N]`` of ``bits`` bits each), lowest first.

    Args:
        turned: rotate each code left by one bit first; of 16 or 32 bits only.

    Returns:
        uint8 ``[N]`` each. Of the highest one only the bits of the code are kept, the rest is 0.
    """
    codes = codes.to(code_dtype(bits))
    if turned:
        codes = codes << 1 | codes >> (bits - 1) & 1
    data = codes.contiguous().view(torch.uint8).view(-1, codes.element_size())
    # One by one: torch transposes such a matrix twenty times as slowly.
    planes = [column.clone(memory_format=torch.contiguous_format) for column in data.unbind(1)]
    if bits % 8:
        planes[-1] &= 2 ** (bits % 8) - 1
    return planes


def merge_planes_reference(out: Tensor, planes: Sequence[Tensor], turned: bool = False) -> None:
    """The inverse of :func:`split_planes` with plain torch operations.

    Args:
        out: ``[N]``, contiguous, of a dtype of 2 or 4 bytes: is given the bits of the codes.
        planes: 2 or 4, uint8 ``[N]`` each; lowest first.
        turned: the codes were rotated; they are rotated back.
    """
    codes = torch.stack(tuple(planes), 1).view(code_dtype(8 * len(planes))).flatten()
    if turned:
        low = codes >> 1 & torch.iinfo(codes.dtype).max
        codes = low | codes << (8 * len(planes) - 1)
    out.view(codes.dtype).copy_(codes)


def decode_planes_reference(
    out: Tensor,
    planes: Sequence[Tensor],
    offsets: Sequence[Tensor],
    lengths: Sequence[Tensor],
    chunk_size: int,
    turned: bool = False,
) -> None:
    """:func:`merge_planes_reference` of planes that are decoded first, as far as they are coded.

    Args:
        out, turned: as there.
        planes: uint8, a Huffman stream each, or ``[N]`` as it is.
        offsets, lengths: of each plane, as :func:`huffman_decode_reference` takes them; empty ones
            of a plane that is not coded.
        chunk_size: symbols in a chunk, of all streams.

    Raises:
        ValueError: a stream is corrupt.
    """
    decoded = [
        huffman_decode_reference(plane, *code, out.numel(), chunk_size)
        if code[1].numel()
        else plane
        for plane, *code in zip(planes, offsets, lengths, strict=True)
    ]
    merge_planes_reference(out, decoded, turned)
