"""Decoding the next layer's weight on a stream of its own while a layer computes (CUDA)."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compressops.formats import PackedTensor

if TYPE_CHECKING:
    from compressops.nn.weight import PackedWeight

Kernel = tuple[Tensor | None, ...]


def enabled(device: torch.device) -> bool:
    """Whether weights of this device are decoded ahead: ``COMPRESSOPS_DECODE_AHEAD=1`` asks for it.

    A graph that is being captured has no part in it: what it replays cannot follow the order.
    """
    asked = device.type == "cuda" and os.environ.get("COMPRESSOPS_DECODE_AHEAD") == "1"
    return asked and not torch.cuda.is_current_stream_capturing()


class Streams(Protocol):
    """Two streams of a device, which run what they are given in order, and wait for each other by
    events: the one that computes, current when this is made, and the one that decodes."""

    def compute_record(self) -> Any:
        """An event behind all that the computing stream was given."""

    def compute_wait(self, event: Any) -> None:
        """What the computing stream is given from now on waits for ``event``."""

    def decode_record(self) -> Any:
        """`compute_record` of the decoding stream."""

    def decode_wait(self, event: Any) -> None:
        """`compute_wait` of the decoding stream."""

    def decoding(self) -> contextlib.AbstractContextManager[Any]:
        """What is called in this block goes to the decoding stream."""

    def share(self, tensor: Tensor) -> None:
        """Memory of ``tensor`` is used again only when both streams are done with it."""


class CudaStreams:
    """The current stream of a CUDA device, and one beside it."""

    def __init__(self, device: torch.device) -> None:
        self._compute = torch.cuda.current_stream(device)
        self._decode = torch.cuda.Stream(device)

    def compute_record(self) -> torch.cuda.Event:
        return self._compute.record_event()

    def compute_wait(self, event: torch.cuda.Event) -> None:
        self._compute.wait_event(event)

    def decode_record(self) -> torch.cuda.Event:
        return self._decode.record_event()

    def decode_wait(self, event: torch.cuda.Event) -> None:
        self._decode.wait_event(event)

    def decoding(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._decode)

    def share(self, tensor: Tensor) -> None:
        tensor.record_stream(self._compute)
        tensor.record_stream(self._decode)


def streams(device: torch.device) -> Streams:
    """Those of a device."""
    return CudaStreams(device)


class _Decoded(NamedTuple):
    """A weight that was decoded ahead, or is being."""

    packed: PackedTensor
    kernel: Kernel
    turn: int


class DecodeAhead:
    """Two buffers in turn: while a layer computes with one, the weight that followed it the last
    time is decoded into the other.

    The layers' order is learnt as they run. Where it changes, or a weight was written to since,
    what was decoded is thrown away, and the layer decodes as it would alone. A weight that cannot
    be decoded ahead (it is corrupt) raises where its own layer runs.

    Args:
        streams: of the device.
        allocate: uint8 memory of so many bytes, on the computing stream.
    """

    def __init__(self, streams: Streams, allocate: Callable[[int], Tensor]) -> None:
        self._streams, self._allocate = streams, allocate
        self._buffers: list[Tensor | None] = [None, None]
        self._turn = 0
        self._pending: _Decoded | None = None
        self._done: Any = None
        self._last: Callable[[], PackedWeight | None] = lambda: None
        self._followers: weakref.WeakKeyDictionary[PackedWeight, weakref.ref[PackedWeight]]
        self._followers = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)

    def run(self, weight: PackedWeight, function: Callable[[Kernel], Tensor]) -> Tensor:
        """``function`` of the decoded ``weight``, whose ``_shared_nbytes`` are not 0."""
        kernel = self._take(weight)
        if (last := self._last()) is not None:
            self._followers[last] = weakref.ref(weight)
        self._last = weakref.ref(weight)
        following = self._followers.get(weight, lambda: None)()
        # Before the event: memory that is freed while the layer computes may still be read by it.
        buffer = None if following is None else self._other_buffer(following)
        # Behind all that wrote to weights and read the other buffer, and before this layer.
        begun = self._streams.compute_record()
        result = function(kernel)
        if following is not None and buffer is not None:
            self._start(following, buffer, begun)
        return result

    def _take(self, weight: PackedWeight) -> Kernel:
        pending, self._pending = self._pending, None
        if self._done is not None:
            # Taken or not: both buffers are the computing stream's from here on.
            self._streams.compute_wait(self._done)
            self._done = None
        if pending is not None and weight.packed() is pending.packed:
            self._turn = pending.turn
            return pending.kernel
        return weight._decode_into(self._buffer(weight, self._turn))

    def _buffer(self, weight: PackedWeight, turn: int) -> Tensor | None:
        """The buffer of this turn, or the beginning of it, as large as the weight takes."""
        nbytes = weight._shared_nbytes() if weight.keeps_none() else 0
        if not nbytes:
            return None
        buffer = self._buffers[turn]
        if buffer is None or buffer.numel() < nbytes:
            self._buffers[turn] = buffer = None  # freed before its successor is allocated
            self._buffers[turn] = buffer = self._allocate(nbytes)
            self._streams.share(buffer)
        return buffer[:nbytes]

    def _other_buffer(self, following: PackedWeight) -> Tensor | None:
        """The buffer of the next turn; ``None`` where the device has memory for one alone."""
        try:
            return self._buffer(following, 1 - self._turn)
        except torch.OutOfMemoryError:
            return None

    def _start(self, weight: PackedWeight, buffer: Tensor, begun: Any) -> None:
        """Decode ``weight`` on its stream, which does what it is given after ``begun``."""
        self._streams.decode_wait(begun)
        try:
            with self._streams.decoding():
                packed, kernel = weight.packed(), weight._decode_into(buffer)
        except (ValueError, RuntimeError):
            pass  # nobody asked for it yet: its own layer decodes it again, and raises
        else:
            for tensor in kernel[1:]:
                if tensor is not None:
                    self._streams.share(tensor)
            self._pending = _Decoded(packed, kernel, 1 - self._turn)
        self._done = self._streams.decode_record()
