"""merge_planes in Triton: each program reads a block of every plane and writes its codes.

Semantics: :func:`compressops.ops.merge_planes`. Memory is the limit: a code is as many bytes to
read as to write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .checks import require

OP = "merge_planes"
CODES = {2: torch.int16, 4: torch.int32}
DTYPES = {torch.int16, torch.int32, torch.bfloat16, torch.float16, torch.float32}
BLOCK = 1024


@triton.jit
def merged(
    code,
    plane_0,
    plane_1,
    plane_2,
    plane_3,
    at,
    inside,
    PLANES: tl.constexpr,
    RAW: tl.constexpr,
    TURNED: tl.constexpr,
):
    """int32 codes, and in their bytes p those of the planes whose bits are in RAW."""
    if PLANES == 2:
        code &= 0xFFFF
    if RAW & 1:
        code |= tl.load(plane_0 + at, mask=inside, other=0).to(tl.int32)
    if RAW & 2:
        code |= tl.load(plane_1 + at, mask=inside, other=0).to(tl.int32) << 8
    if RAW & 4:
        code |= tl.load(plane_2 + at, mask=inside, other=0).to(tl.int32) << 16
    if RAW & 8:
        code |= tl.load(plane_3 + at, mask=inside, other=0).to(tl.int32) << 24
    if TURNED:
        code = ((code >> 1) & 0x7FFFFFFF) | (code << (8 * PLANES - 1))
    return code


@triton.jit
def merge_planes_kernel(
    out,
    plane_0,
    plane_1,
    plane_2,
    plane_3,
    count,
    PLANES: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [count] in int16 or int32; of two planes the others are not read."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    none = tl.zeros([BLOCK], tl.int32)
    RAW: tl.constexpr = (1 << PLANES) - 1
    code = merged(
        none, plane_0, plane_1, plane_2, plane_3, at, inside, PLANES, RAW=RAW, TURNED=TURNED
    )
    tl.store(out + at, code.to(out.dtype.element_ty), mask=inside)


def merge_planes(out: torch.Tensor, planes: Sequence[torch.Tensor], turned: bool = False) -> None:
    """Write the codes that ``planes`` hold to ``out``.

    Args:
        out: ``[N]``, contiguous, of an integer or float dtype of 2 or 4 bytes.
        planes: as many as ``out`` has bytes an element: uint8 ``[N]``, contiguous, lowest first.
        turned: rotate each code right by one bit.

    Raises:
        ValueError: an argument is not of that form.
    """
    fits = out.dim() == 1 and out.is_contiguous() and out.dtype in DTYPES
    require(fits, OP, "out", "a contiguous vector of 2 or 4 bytes an element", out)
    needed = f"{out.element_size()} tensors for {out.dtype}"
    require(len(planes) == out.element_size(), OP, "planes", needed, len(planes))
    for plane in planes:
        fits = plane.dtype == torch.uint8 and plane.shape == out.shape and plane.is_contiguous()
        form = f"contiguous torch.uint8 {list(out.shape)} on {out.device}"
        require(fits and plane.device == out.device, OP, "planes", form, plane)
    count = out.numel()
    if not count:
        return
    with torch.cuda.device_of(out):
        merge_planes_kernel[(triton.cdiv(count, BLOCK),)](
            out.view(CODES[len(planes)]),
            *(planes[p % len(planes)] for p in range(4)),
            count,
            PLANES=len(planes),
            TURNED=turned,
            BLOCK=BLOCK,
            num_warps=4,
        )
