"""huffman_decode_planes in Triton: a pass of `huffman_decode` for each plane that is coded, the
first of which merges what is raw. Semantics: :func:`compressops.ops.huffman_decode_planes`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import require
from .huffman_decode import decode_stream
from .merge_planes import CODES, DTYPES, merge_planes

OP = "huffman_decode_planes"


def huffman_decode_planes(
    out: torch.Tensor,
    planes: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    chunk_size: int,
    turned: bool = False,
) -> None:
    """Write the codes that ``planes`` hold to ``out``; those of no lengths are raw.

    Args:
        out: ``[N]``, contiguous, of an integer or float dtype of 2 or 4 bytes.
        planes: as many as ``out`` has bytes an element: uint8, contiguous, lowest first.
        offsets, lengths: of each plane, as ``huffman_decode`` takes them.
        chunk_size: of all streams.
        turned: rotate each code right by one bit.

    Raises:
        ValueError: an argument is not of that form, or a stream is corrupt.
    """
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
            form = f"contiguous {dtype} vectors on {out.device}"
            require(fits and tensor.device == out.device, OP, name, form, tensor)
    coded = [p for p, length in enumerate(lengths) if length.numel()]
    if not coded:
        merge_planes(out, planes, turned)
        return
    raw: list[torch.Tensor | None] = [None] * len(planes)
    for p in set(range(len(planes))).difference(coded):
        fits = planes[p].shape == out.shape
        require(fits, OP, "planes", f"{list(out.shape)} where not coded", planes[p])
        raw[p] = planes[p]
    codes = out.view(CODES[len(planes)])
    for p in coded:
        decode_stream(
            *(OP, planes[p], offsets[p], lengths[p], chunk_size, codes),
            coded=p,
            planes=raw if p == coded[0] else [None] * len(planes),
            begun=p != coded[0],
            turned=turned and p == coded[-1],
        )
