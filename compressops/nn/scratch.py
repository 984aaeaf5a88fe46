"""Memory that packed weights are decoded into for one call: one buffer a device, shared by all, or
two where the next layer's is decoded ahead."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compressops.nn import ahead
from compressops.ops.huge_pages import empty_on_huge_pages

# Of a GPU also by stream: what one stream still reads, another must not overwrite.
_Key = tuple[torch.device, int]

# Re-entrant, because a weight may die, and call `leave`, at any line of the thread that holds it.
_lock = threading.RLock()
_idle: dict[_Key, Tensor] = {}
_ahead: dict[_Key, ahead.DecodeAhead | None] = {}  # None: a call has it
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
    key = _key(device)
    with _lock:
        _enter(user)
        buffer = _idle.pop(key, None)
    if buffer is None or buffer.numel() < nbytes:
        # Freed before its successor is allocated.
        buffer = None
        buffer = _allocate(device, nbytes)
    try:
        yield buffer[:nbytes]
    finally:
        with _lock:
            other = _idle.get(key)
            if _users and (other is None or other.numel() < buffer.numel()):
                _idle[key] = buffer


@contextlib.contextmanager
def lease_ahead(user: nn.Module, device: torch.device) -> Iterator[ahead.DecodeAhead | None]:
    """What decodes ahead on the current stream of a device, for as long as the ``with`` block runs;
    ``None`` where another thread, or a call around this one, has it."""
    key = _key(device)
    with _lock:
        _enter(user)
        found = _ahead.get(key)
        taken = found is None and key in _ahead
        if not taken:
            _ahead[key] = None
    if taken:
        yield None
        return
    try:
        if found is None:
            allocate = functools.partial(_allocate, device)
            found = ahead.DecodeAhead(ahead.streams(device), allocate)
        yield found
    finally:
        with _lock:
            if found is not None and _users:
                _ahead[key] = found
            else:
                _ahead.pop(key, None)


def _key(device: torch.device) -> _Key:
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _enter(user: nn.Module) -> None:
    name = id(user)
    if name not in _users:
        _users[name] = weakref.ref(user, lambda _: leave(name))


def _allocate(device: torch.device, nbytes: int) -> Tensor:
    with torch.inference_mode(False):
        return empty_on_huge_pages(nbytes, torch.empty(0, device=device), torch.uint8)


def leave(user: int) -> None:
    """The user of this ``id`` needs no buffer any more; after the last one, memory is freed."""
    with _lock:
        _users.pop(user, None)
        if not _users:
            _idle.clear()
            for key in [key for key, found in _ahead.items() if found is not None]:
                del _ahead[key]


def held() -> int:
    """Bytes of the buffers that wait for their next use."""
    with _lock:
        found = (*_idle.values(), *(turns for turns in _ahead.values() if turns is not None))
        return sum(buffers.nbytes for buffers in found)
