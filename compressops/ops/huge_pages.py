"""Packed weights in memory of huge pages."""

from __future__ import annotations

import contextlib
import mmap

import torch

PAGE = 2 * 1024**2


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is contiguous, in huge pages as far as it fills some and the system has them.

    A core that streams a weight from memory waits for the addresses of its pages: at 4 KB a page
    that costs a third of the bandwidth, and hardware prefetchers stop where a page ends.

    Args:
        tensor: any; one that is not in plain CPU memory, or below 2 MB, comes back as it is.

    Returns:
        ``tensor``, or a contiguous copy in memory of its own, of which only what the copy fills is
        ever resident.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux alone
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    if advice is None or not plain or tensor.nbytes < PAGE or torch.compiler.is_compiling():
        return tensor
    memory = mmap.mmap(-1, tensor.nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    # Whole ones: the rest of the last would be memory that nothing uses. A kernel without huge
    # pages refuses, and the copy is in small ones as the tensor was.
    with contextlib.suppress(OSError):
        memory.madvise(advice, start, tensor.nbytes // PAGE * PAGE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)
