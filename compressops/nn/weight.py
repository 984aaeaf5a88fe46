"""A packed weight inside a module: its parts as buffers, and what is decoded from them."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from compressops import ops
from compressops.formats import Coding, Layout, Number, PackedTensor
from compressops.formats.rows import has_rows, unpack_rows
from compressops.nn import ahead, scratch
from compressops.ops.checks import version
from compressops.ops.huge_pages import empty_to_keep

RESIDENCIES = ("decoded", "packed")


def outside_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a method out of compiled graphs: ``torch.compiler.disable``, which would import the
    whole compiler (over a second) even where nothing is ever compiled."""

    @functools.cache
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(method)

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        return (disabled() if "torch._dynamo" in sys.modules else method)(*args)

    call._torchdynamo_disable = True
    return call


class PackedWeight(nn.Module):
    """A `PackedTensor` whose parts are buffers, and what forward needs of it.

    The parts are the bytes that go to the file: `.half()`, `.to(dtype)` and `.to(memory_format)`
    never touch them, only what is decoded from them. Layers that share a weight share one
    `PackedWeight`.

    Args:
        packed: the weight.
        residency: ``"decoded"`` keeps a dense copy beside the parts, decoded once;
            ``"packed"`` decodes on every use, into one buffer that all packed weights share.
            Decoding is no part of a compiled graph: such a layer breaks it, and
            ``torch.compile(fullgraph=True)`` refuses it.
        like: tensor whose dtype, device and strides the decoded weight takes. ``None``: the
            packed tensor's own dtype, its parts' device, contiguous.

    Raises:
        ValueError: an unknown residency, or ``like`` of another shape than ``packed``.
    """

    # Whether decoded residency keeps floats, and not something else.
    keeps_floats: ClassVar[bool] = True

    def __init__(
        self, packed: PackedTensor, residency: str = "decoded", like: Tensor | None = None
    ) -> None:
        super().__init__()
        self.residency = check_residency(residency)
        self.shape = torch.Size(packed.shape)
        device = next(iter(packed.parts.values())).device if packed.parts else torch.device("cpu")
        if like is None:
            like = torch.empty(self.shape, dtype=packed.dtype, device="meta")
        elif like.shape != self.shape:
            raise ValueError(
                f"weight: a layer of weight {tuple(like.shape)} was given a packed tensor of "
                f"{tuple(self.shape)}"
            )
        elif like.device.type != "meta":
            device = like.device
        # empty_like keeps the strides of dense tensors and makes anything else contiguous: a
        # convolution's bits depend on its weight's memory format.
        self._strides = torch.empty_like(like, device="meta").stride()
        probe = torch.zeros((2,) * like.dim(), dtype=like.dtype, device=device)
        channels_last = _CHANNELS_LAST.get(like.dim())
        if channels_last is not None:
            # By strides: a 1×1 kernel is_contiguous() in every format.
            formats = (torch.contiguous_format, channels_last)
            strides = [
                torch.empty_like(like, device="meta", memory_format=f).stride() for f in formats
            ]
            if self._strides == strides[1] != strides[0]:
                probe = probe.to(memory_format=channels_last)
        # What Module.to() does to this probe is what the decoded weight has to follow.
        self.register_buffer("_probe", probe, persistent=False)
        self._set_packed(packed.to(device))
        self._materialize()

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self._probe.device

    @property
    def channels_last(self) -> bool:
        """Whether the layer's weight has that memory format, and not at once the other one."""
        probe, wanted = self._probe, _CHANNELS_LAST.get(self._probe.dim())
        return wanted is not None and probe.is_contiguous(memory_format=wanted)

    # The parts.

    def packed(self) -> PackedTensor:
        """The weight as the value that is saved and measured; shares the buffers' memory.

        Raises:
            ValueError: the buffers were written to, and are no valid parts any more.
        """
        parts = {name: self._buffers[name] for name in self._parts}
        state = [(part, version(part)) for part in parts.values()]
        if self._checked is not None:
            packed, seen = self._checked
            # Checking takes longer than decoding a small weight, and waits for a GPU.
            if all(a is b and v == w for (a, v), (b, w) in zip(state, seen, strict=True)):
                return packed
        packed = PackedTensor.from_spec(self._spec, parts, max_entries=_NO_LIMIT)
        self._checked = packed, state
        return packed

    def described(self) -> list[str]:
        """The three axes and the size as text; asks nothing of the parts, which may be on meta."""
        axes = (("layout", Layout), ("number", Number), ("coding", Coding))
        nbytes = sum(self._spec["parts"].values())
        return [*(str(axis.from_spec(self._spec[name])) for name, axis in axes), f"{nbytes} bytes"]

    def _set_packed(self, packed: PackedTensor) -> None:
        for name in getattr(self, "_parts", ()):
            del self._buffers[name]
        self._spec = packed.to_spec()
        self._checked: tuple[PackedTensor, list[tuple[Tensor, int]]] | None = None
        self._parts = tuple(packed.parts)  # in the file's order
        for name in self._parts:
            self.register_buffer(name, packed.parts[name])

    def part_buffers(self) -> Iterator[Tensor]:
        """The buffers that hold the packed bytes."""
        return (self._buffers[name] for name in self._parts)

    # What is decoded from them.

    def resident_buffers(self) -> Iterator[Tensor]:
        """The buffers that are decoded from the parts and kept."""
        return (self._buffers[name] for name in self._resident() if name in self._buffers)

    def _resident(self) -> tuple[str, ...]:
        return ("decoded",)

    def _materialize(self) -> None:
        """Decode what this residency keeps, from the parts."""
        if self.residency == "decoded":
            self.register_buffer("decoded", self._decode(), persistent=False)

    @outside_graphs
    def _decode(self) -> Tensor:
        device, dtype = self._probe.device, self._probe.dtype
        if device.type == "meta":
            return torch.empty_strided(self.shape, self._strides, dtype=dtype, device=device)
        flat = empty_to_keep(self.shape.numel(), self._probe, dtype)
        out = flat.as_strided(self.shape, self._strides)
        return self.packed().unpack(ops.DECODER, out=out)

    def has_rows(self) -> bool:
        """Whether `rows` gives those of the decoded weight, without the others."""
        packed = self.packed()
        return packed.dtype == self._probe.dtype and has_rows(packed)

    def rows(self, wanted: Tensor) -> Tensor:
        """The rows of these indices (int64 ``[n]``, each once), in the compute dtype."""
        return unpack_rows(self.packed(), wanted, ops.DECODER).to(self._probe.dtype)

    def keeps_none(self) -> bool:
        """Whether a call decodes what it needs, and nobody but it may keep that."""
        probe = self._probe
        kept = self.residency == "decoded" or torch.compiler.is_compiling() or probe.is_meta
        return not (kept or _has_interpreters())

    def kernel(self) -> tuple[Tensor | None, ...]:
        """The weight as a layer's function takes it."""
        decoded = self._buffers.get("decoded")
        return (self._decode() if decoded is None else decoded,)

    def run(self, function: Callable[..., Tensor], input: Tensor, *args: Any) -> Tensor:
        """``function(input, *kernel, *args)`` with what `kernel` gives. Where the weight is not
        kept, that is decoded into memory that all packed weights share, and gone when this returns.

        For a backward pass nothing of it is kept either: the weight is decoded again.
        """
        nbytes = self._shared_nbytes() if self.keeps_none() else 0
        if not nbytes:
            return function(input, *self.kernel(), *args)
        if not torch.is_grad_enabled() and ahead.enabled(self.device):
            with scratch.lease_ahead(self, self.device) as turns:
                if turns is not None:
                    return turns.run(self, lambda kernel: function(input, *kernel, *args))
        with scratch.lease(self, self._probe.device, nbytes) as buffer:
            kernel = self._decode_into(buffer)
            if not torch.is_grad_enabled():
                return function(input, *kernel, *args)
            address = buffer.untyped_storage().data_ptr()

            packed = self.packed()

            # With hooks autograd itself no longer sees what was written to since. Detached: a
            # result would hold itself. Autograd puts the tensor back into its graph.
            def keep(saved: Tensor) -> tuple:
                if saved.untyped_storage().data_ptr() != address or not saved.numel():
                    return saved.detach(), version(saved)
                return saved.shape, saved.stride(), saved.storage_offset()

            def restore(kept: tuple) -> Tensor:
                if len(kept) == 2:
                    saved, seen = kept
                    if version(saved) != seen:
                        raise RuntimeError(
                            f"a tensor that the backward pass of a layer of shape "
                            f"{list(self.shape)} needs was written to in place: its version is "
                            f"{version(saved)} instead of {seen}"
                        )
                    return saved
                if self.packed() is not packed:
                    raise RuntimeError(
                        f"the packed weight of shape {list(self.shape)} was changed between "
                        f"forward and backward"
                    )
                return self.kernel()[0].as_strided(*kept)

            with torch.autograd.graph.saved_tensors_hooks(keep, restore):
                return function(input, *kernel, *args)

    def _shared_nbytes(self) -> int:
        """Bytes of shared memory that `_decode_into` takes; 0: it cannot."""
        return self.shape.numel() * self._probe.element_size()

    def _decode_into(self, buffer: Tensor) -> tuple[Tensor | None, ...]:
        """`kernel` of a weight that is not kept; only the first tensor is in the buffer, and begins
        there."""
        weight = buffer.view(self._probe.dtype).as_strided(self.shape, self._strides)
        self.packed().unpack(ops.DECODER, out=weight)
        return (weight,)

    def forward(self) -> Tensor:
        """The dense weight in the compute dtype."""
        return self.decoded if self.residency == "decoded" else self._decode()

    def set_residency(self, residency: str) -> None:
        """Switch between ``"decoded"`` and ``"packed"``."""
        self.residency = check_residency(residency)
        scratch.leave(id(self))
        for name in self._resident():
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self._materialize()

    # Moving, saving, copying.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        for name in self._parts:
            part = self._buffers[name]
            # Module.to() casts floating tensors: seen as bytes, scales stay what the file holds.
            self._buffers[name] = fn(_flat_bytes(part)).view(part.dtype).view_as(part)
        before, after = self._probe, fn(self._probe)
        self._buffers["_probe"] = after
        channels_last = _CHANNELS_LAST.get(before.dim())
        if channels_last is not None:
            is_last = [t.is_contiguous(memory_format=channels_last) for t in (before, after)]
            if is_last[0] != is_last[1]:
                target = channels_last if is_last[1] else torch.contiguous_format
                shadow = torch.empty_strided(self.shape, self._strides, device="meta")
                self._strides = shadow.to(memory_format=target).stride()
        # From "meta" there is nothing to decode yet: to_empty() is followed by load_state_dict.
        if self._stays_valid(before, after) or before.device.type == "meta":
            for name in self._resident():
                if name in self._buffers:
                    self._buffers[name] = self._moved(fn, self._buffers[name])
        else:
            self._materialize()
        return self

    def _moved(self, fn: Callable[[Tensor], Tensor], resident: Tensor) -> Tensor:
        return fn(resident)

    def _stays_valid(self, before: Tensor, after: Tensor) -> bool:
        # A cast decodes anew, so that .half().float() gives back the exact weight.
        return before.dtype == after.dtype

    def get_extra_state(self) -> Tensor:
        """The spec as JSON in a uint8 tensor, so that a state dict holds tensors only."""
        return torch.frombuffer(bytearray(json.dumps(self._spec).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the spec is taken up before the parts are, see `_load_from_state_dict`."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = state_dict.get(prefix + "_extra_state")
        if state is not None:
            # The loaded weight may be packed in another way, its parts of other names and sizes.
            try:
                spec = json.loads(bytes(state.cpu().tolist()))
                parts = {name: state_dict[prefix + name] for name in spec["parts"]}
                packed = PackedTensor.from_spec(spec, parts, max_entries=_NO_LIMIT)
                if tuple(packed.shape) != tuple(self.shape):
                    raise ValueError(f"shape {tuple(packed.shape)}, expected {tuple(self.shape)}")
                self._set_packed(packed)
            except (ValueError, KeyError, TypeError) as error:
                error_msgs.append(f"{prefix.rstrip('.')}: no valid packed weight: {error}")
                return
            device = self._probe.device
            if device.type == "meta" and local_metadata.get("assign_to_params_buffers"):
                device = next(iter(parts.values())).device
                self._buffers["_probe"] = torch.zeros_like(self._probe, device=device)
            for name in self._parts:
                self._buffers[name] = torch.empty_like(self._buffers[name], device=device)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        self._materialize()

    def __getstate__(self) -> dict[str, Any]:
        # What can be decoded is not pickled: torch.save(model) stays as small as the parts.
        resident = self._resident()
        buffers = {k: v for k, v in self._buffers.items() if k not in resident}
        # Plain pickle knows no uint16: all parts travel as bytes.
        for name in self._parts:
            buffers[name] = (buffers[name].dtype, buffers[name].shape, _flat_bytes(buffers[name]))
        return {**self.__dict__, "_buffers": buffers, "_checked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers = dict(state["_buffers"])
        for name in state["_parts"]:
            dtype, shape, flat = buffers[name]
            buffers[name] = flat.view(dtype).view(shape)
        super().__setstate__({**state, "_buffers": buffers})
        self._materialize()


def check_residency(residency: str) -> str:
    """``residency`` itself.

    Raises:
        ValueError: it is neither ``"decoded"`` nor ``"packed"``.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"residency must be one of {RESIDENCIES}, got {residency!r}")
    return residency


def _flat_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _has_interpreters() -> bool:
    """Whether a mode or a transform of functions has a say in calls, and may keep the weight."""
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or bool(_len_torch_dispatch_stack())


def as_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` of `Module._apply` makes of a tensor that may move, but not change: seen as a
    vector of bytes it is neither cast nor given another memory format."""
    flat = fn(_flat_bytes(tensor))
    return flat.view(tensor.dtype).view(tensor.shape)


# The shape is known and wanted, however small the parts are.
_NO_LIMIT = 2**62
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
