"""Codes of 16 or 32 bits from planes of bytes that are Huffman streams, or stored as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends import register
from ..formats.huffman import MAX_CHUNK_SIZE
from .checks import require
from .huffman_decode import huffman_decode
from .merge_planes import DTYPES, merge_planes

OP = "huffman_decode_planes"


def huffman_decode_planes(
    out: torch.Tensor,
    planes: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    chunk_size: int,
    turned: bool = False,
) -> None:
    """:func:`huffman_decode` of the planes that are coded and :func:`merge_planes` of all, chunk by
    chunk: no plane is written to memory and read again.

    Args:
        out: ``[N]``, contiguous, of any integer or float dtype of 2 or 4 bytes.
        planes: as many as ``out`` has bytes an element, the lowest bits first; uint8, contiguous,
            on the device of ``out``: a stream of N symbols, or ``[N]`` as it is.
        offsets, lengths: of each plane, as `huffman_decode` takes them. Where a plane is not coded,
            its lengths are empty, and its offsets mean nothing.
        chunk_size: symbols in each chunk but the last, 1 to 32768, of all streams.
        turned: the codes are floats, whose sign is their lowest bit.

    Raises:
        ValueError: an argument is not of that form, lengths are no complete prefix code, or a
            stream is corrupt; the contents of ``out`` then mean nothing.
    """
    _call(out, list(planes), list(offsets), list(lengths), chunk_size, turned)


def _check(out, planes, offsets, lengths, chunk_size, turned=False) -> None:
    del turned
    fits = out.dim() == 1 and out.is_contiguous() and out.dtype in DTYPES
    require(fits, OP, "out", "a contiguous vector of 2 or 4 bytes an element", out)
    needed = f"{out.element_size()} tensors for {out.dtype}"
    for name, tensors, dtype in (
        ("planes", planes, torch.uint8),
        ("offsets", offsets, torch.int64),
        ("lengths", lengths, torch.uint8),
    ):
        require(len(tensors) == out.element_size(), OP, name, needed, len(tensors))
        for tensor in tensors:
            fits = tensor.dtype == dtype and tensor.dim() == 1 and tensor.is_contiguous()
            fits = fits and tensor.device == out.device
            require(fits, OP, name, f"contiguous {dtype} vectors on {out.device}", tensor)
    require(
        1 <= chunk_size <= MAX_CHUNK_SIZE,
        OP,
        "chunk_size",
        f"from 1 to {MAX_CHUNK_SIZE}",
        chunk_size,
    )
    count, chunks = out.numel(), -(-out.numel() // chunk_size)
    for plane, offset, length in zip(planes, offsets, lengths, strict=True):
        if not length.numel():
            require(plane.numel() == count, OP, "planes", f"[{count}] where not coded", plane)
            continue
        require(length.numel() <= 256, OP, "lengths", "at most 256 long", length)
        entries = f"of {chunks + 1} entries (one a chunk, and the end)"
        require(offset.numel() == chunks + 1, OP, "offsets", entries, offset)


def _fake(out, planes, offsets, lengths, chunk_size, turned=False) -> None:
    del out, planes, offsets, lengths, chunk_size, turned


def _eager(out, planes, offsets, lengths, chunk_size, turned=False) -> None:
    # By the ops, so that where this one has no kernel theirs serve.
    decoded = [
        huffman_decode(plane, *code, out.numel(), chunk_size) if code[1].numel() else plane
        for plane, *code in zip(planes, offsets, lengths, strict=True)
    ]
    merge_planes(out, decoded, turned)


_call = register(OP, eager=_eager, fake=_fake, check=_check)
