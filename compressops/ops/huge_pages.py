"""Packed weights in memory of their own: of huge pages, where they fill some."""

from __future__ import annotations

import contextlib
import mmap

import torch

PAGE = 2 * 1024**2
# Bytes from which `empty_to_keep` takes pages of its own: what rounding up to whole ones costs is
# then a sixteenth at most.
KEPT = 1 << 16


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
    if tensor.nbytes < PAGE or not _has_huge_pages(tensor):
        return tensor
    return _mapped(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def empty_on_huge_pages(count: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty(count)`` on the device of ``like``, in huge pages where `on_huge_pages` would
    put a tensor of that size.

    Memory of the system's is given page by page when it is first written to; a virtual machine
    takes 16 ms for 32 MB of pages of 4 KB, and 3 ms for huge ones.
    """
    return _empty(count, like, dtype, PAGE)


def empty_to_keep(count: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`empty_on_huge_pages`, and from 64 KB on in pages of its own.

    For what a model keeps: between tensors that come and go while it is loaded it would leave holes
    in the allocator's memory, which of a model in 8 bits were half of its size.
    """
    return _empty(count, like, dtype, KEPT)


def _empty(count: int, like: torch.Tensor, dtype: torch.dtype, least: int) -> torch.Tensor:
    if count * dtype.itemsize < least or not _has_huge_pages(like):
        return torch.empty(count, dtype=dtype, device=like.device)
    return _mapped(count, dtype)


def _has_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the system has them, and the tensor is in plain CPU memory."""
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    return plain and hasattr(mmap, "MADV_HUGEPAGE") and not torch.compiler.is_compiling()


def _mapped(count: int, dtype: torch.dtype) -> torch.Tensor:
    nbytes = count * dtype.itemsize
    huge = nbytes // PAGE * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, nbytes + (PAGE if huge else 0), flags=flags)
    start = 0
    if huge:
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
        # Whole ones: the rest of the last would be memory that nothing uses. A kernel without huge
        # pages refuses, and the tensor is in small ones as any other is.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
