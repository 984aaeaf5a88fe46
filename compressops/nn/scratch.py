"""Memory that packed weights are decoded into for one call: one buffer a device, shared by all."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compressops.ops.huge_pages import empty_on_huge_pages

# Of a GPU also by stream: what one stream still reads, another must not overwrite.
_Key = tuple[torch.device, int]

# Re-entrant, because a weight may die, and call `leave`, at any line of the thread that holds it.
_lock = threading.RLock()
_idle: dict[_Key, Tensor] = {}
_users: dict[int, weakref.ref[nn.Module]] = {}


@contextlib.contextmanager
def lease(user: nn.Module, device: torch.device, nbytes: int) -> Iterator[Tensor]:
    """The shared buffer, or the beginning of it, for as long as the ``with`` block runs.

    A thread (or a call inside a call) that finds the buffer taken gets one of its own; of those
    that are given back the largest stays. It grows to the largest weight, and lives as long as any
    ``user`` that has leased it does.

    Returns:
        uint8 ``[nbytes]``, of any content; what is made of it must not outlive the block.
    """
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        if id(user) not in _users:
            name = id(user)
            _users[name] = weakref.ref(user, lambda _: leave(name))
        buffer = _idle.pop(key, None)
    if buffer is None or buffer.numel() < nbytes:
        # Freed before its successor is allocated.
        buffer = None
        with torch.inference_mode(False):
            buffer = empty_on_huge_pages(nbytes, torch.empty(0, device=device), torch.uint8)
    try:
        yield buffer[:nbytes]
    finally:
        with _lock:
            other = _idle.get(key)
            if _users and (other is None or other.numel() < buffer.numel()):
                _idle[key] = buffer


def leave(user: int) -> None:
    """The user of this ``id`` needs no buffer any more; after the last one, memory is freed."""
    with _lock:
        _users.pop(user, None)
        if not _users:
            _idle.clear()


def held() -> int:
    """Bytes of the buffers that wait for their next use."""
    with _lock:
        return sum(buffer.nbytes for buffer in _idle.values())
