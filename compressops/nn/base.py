"""What every drop-in module shares: a packed weight, kept packed or decoded beside its parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressops import backends, ops, schema
from compressops.formats import PackedTensor

RESIDENCIES = ("decoded", "packed")


class PackedWeight(nn.Module):
    """A `PackedTensor` whose parts are buffers, and what forward needs of it.

    The parts are the bytes that go to the file: `.half()`, `.to(dtype)` and `.to(memory_format)`
    never touch them, only what is decoded from them. Layers that share a weight share one
    `PackedWeight`.

    Args:
        packed: the weight.
        residency: ``"decoded"`` keeps a dense copy beside the parts, decoded once;
            ``"packed"`` decodes on every use and drops the copy.
        like: tensor whose dtype, device and strides the decoded weight takes. ``None``: the
            packed tensor's own dtype, its parts' device, contiguous.

    Raises:
        ValueError: an unknown residency, or ``like`` of another shape than ``packed``.
    """

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

    # The parts.

    def packed(self) -> PackedTensor:
        """The weight as the value that is saved and measured; shares the buffers' memory."""
        parts = {name: self._buffers[name] for name in self._parts}
        return PackedTensor.from_spec(self._spec, parts, max_entries=_NO_LIMIT)

    def _set_packed(self, packed: PackedTensor) -> None:
        for name in getattr(self, "_parts", ()):
            del self._buffers[name]
        self._spec = packed.to_spec()
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

    @torch.compiler.disable
    def _decode(self) -> Tensor:
        device, dtype = self._probe.device, self._probe.dtype
        out = torch.empty_strided(self.shape, self._strides, dtype=dtype, device=device)
        return out if device.type == "meta" else out.copy_(self.packed().unpack(decode=decode))

    def forward(self) -> Tensor:
        """The dense weight in the compute dtype."""
        return self.decoded if self.residency == "decoded" else self._decode()

    def set_residency(self, residency: str) -> None:
        """Switch between ``"decoded"`` and ``"packed"``."""
        self.residency = check_residency(residency)
        for name in self._resident():
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self._materialize()

    # Moving, saving, copying.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        for name in self._parts:
            part = self._buffers[name]
            # Module.to() casts floating tensors: seen as bytes, scales stay what the file holds.
            self._buffers[name] = (
                fn(part.reshape(-1).view(torch.uint8)).view(part.dtype).view_as(part)
            )
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
            except (ValueError, KeyError, TypeError) as error:
                error_msgs.append(f"{prefix.rstrip('.')}: no valid packed weight: {error}")
                return
            device = self._probe.device
            if device.type == "meta" and local_metadata.get("assign_to_params_buffers"):
                device = next(iter(parts.values())).device
                self._buffers["_probe"] = torch.zeros_like(self._probe, device=device)
            self._set_packed(packed)
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
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._materialize()


class PackedModule(nn.Module):
    """Base of the drop-in modules: options of the layer, a `PackedWeight`, a bias.

    A subclass names its float layer (``source``), the constructor arguments that it takes over
    (``options``), and has a ``forward``.
    """

    source: ClassVar[type[nn.Module]]
    options: ClassVar[tuple[str, ...]]
    weight_type: ClassVar[type[PackedWeight]] = PackedWeight

    def __init__(self, module: nn.Module, weight: PackedWeight) -> None:
        super().__init__()
        if tuple(weight.shape) != tuple(module.weight.shape):
            raise ValueError(
                f"weight: {type(self).__name__} needs shape {tuple(module.weight.shape)}, got a "
                f"packed tensor of {tuple(weight.shape)}"
            )
        for name in self.options:
            setattr(self, name, getattr(module, name))
        self.packed_weight = weight
        bias = getattr(module, "bias", None)
        if bias is not None and bias.device.type == "meta":
            probe = weight._probe
            bias = nn.Parameter(torch.zeros(bias.shape, dtype=probe.dtype, device=probe.device))
        self.register_parameter("bias", bias)
        self.input_quantizer: nn.Module | None = None
        self.train(module.training)

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        layout: Any = None,
        number: Any = None,
        coding: Any = None,
        *,
        residency: str = "decoded",
        lossy: bool = True,
    ) -> PackedModule:
        """Pack a float layer's weight.

        Args:
            module: a layer of this class's ``source`` type; its bias is shared, not copied.
            layout: of `compressops.formats`; ``None`` is ``Dense()``.
            number: ``None`` is ``Float()`` of the weight's dtype.
            coding: ``None`` is ``Raw()``.
            residency: ``"decoded"`` or ``"packed"``.
            lossy: quantize the weight; ``False`` demands that it already is on the number's grid.

        Raises:
            TypeError: ``module`` is of another type.
            ValueError: the weight does not fit the choice.
        """
        from compressops.formats import Dense, Float, Raw

        weight = module.weight.detach()
        packed = PackedTensor.pack(
            weight,
            layout or Dense(),
            number or Float(str(weight.dtype).removeprefix("torch.")),
            coding or Raw(),
            lossy=lossy,
        )
        return cls.from_module(module, packed, residency)

    @classmethod
    def from_module(
        cls, module: nn.Module, packed: PackedTensor | PackedWeight, residency: str = "decoded"
    ) -> PackedModule:
        """A layer with ``module``'s options and bias that runs ``packed`` as its weight."""
        if not isinstance(module, (cls, cls.source)):
            raise TypeError(
                f"module: {cls.__name__} replaces a {cls.source.__name__}, got a "
                f"{type(module).__name__}"
            )
        if not isinstance(packed, PackedWeight):
            packed = cls.weight_type(packed, residency, like=module.weight.detach())
        return cls(module, packed)

    @classmethod
    def from_packed(
        cls, config: dict[str, Any], packed: dict[str, PackedTensor], residency: str = "decoded"
    ) -> PackedModule:
        """Build from `get_config()` and `packed_tensors()`; the bias is zero.

        Raises:
            ValueError: a key of ``config`` is missing, unknown or has no valid value, or the
                shapes disagree.
        """
        expected = {"type", "bias", *cls.options}
        if set(config) != expected:
            raise ValueError(
                f"config of {cls.__name__}: expected the keys {sorted(expected)}, got "
                f"{sorted(config)}"
            )
        if set(packed) != {"weight"}:
            raise ValueError(f"{cls.__name__}: expected the tensor 'weight', got {sorted(packed)}")
        try:
            module = cls._template(config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"config of {cls.__name__}: {config}: {error}") from error
        weight = packed["weight"]
        return cls(module.to(weight.dtype), cls.weight_type(weight, residency))

    @classmethod
    def _template(cls, config: dict[str, Any]) -> nn.Module:
        """The float layer of this config, without memory; its constructor checks the values."""
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls.source(**{k: options[k] for k in options if k != "type"}, device="meta")

    def get_config(self) -> dict[str, Any]:
        """The JSON values that `from_packed` builds this layer from."""
        config: dict[str, Any] = {"type": type(self).__name__}
        for name in self.options:
            value = getattr(self, name)
            config[name] = list(value) if isinstance(value, tuple) else value
        return {**config, "bias": self.bias is not None}

    @property
    def weight(self) -> Tensor:
        """The dense weight, as the float layer has it (decoded on each access if packed)."""
        return self.packed_weight()

    @property
    def residency(self) -> str:
        """``"decoded"`` or ``"packed"``."""
        return self.packed_weight.residency

    def packed_tensors(self) -> dict[str, PackedTensor]:
        """Parameter name to packed tensor: what the file stores instead of the parameter."""
        return {"weight": self.packed_weight.packed()}

    def quantize_input(self, input: Tensor) -> Tensor:
        """``input`` through the quantizer that the compressed layer had, if it had one."""
        return input if self.input_quantizer is None else self.input_quantizer(input)

    def backend(self) -> str:
        """What runs the layer: ``"torch"``, or the backend of its op."""
        return "torch"

    def extra_repr(self) -> str:
        config = self.get_config()
        packed = self.packed_weight.packed()
        shown = [f"{k}={v}" for k, v in config.items() if k != "type"]
        return ", ".join(
            [
                *shown,
                f"{packed.layout}",
                f"{packed.number}",
                f"{packed.coding}",
                f"{packed.nbytes} bytes",
                f"residency={self.residency!r}",
            ]
        )


def check_residency(residency: str) -> str:
    """``residency`` itself.

    Raises:
        ValueError: it is neither ``"decoded"`` nor ``"packed"``.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"residency must be one of {RESIDENCIES}, got {residency!r}")
    return residency


def decode(
    stream: Tensor, offsets: Tensor, lengths: Tensor, num_symbols: int, chunk_size: int
) -> Tensor:
    """`ops.huffman_decode` in the form that `PackedTensor.unpack` takes."""
    return ops.huffman_decode(stream, offsets, lengths, num_symbols, chunk_size)


def as_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` of `Module._apply` makes of a tensor that may move, but not change: seen as a
    vector of bytes it is neither cast nor given another memory format."""
    flat = fn(tensor.reshape(-1).view(torch.uint8))
    return flat.view(tensor.dtype).view(tensor.shape)


def serving(op: str, device: str) -> str:
    """Name of the backend that serves ``op`` on a device type now."""
    kernel = backends.choose(op, device)
    if kernel is schema.native_op(op):
        return device
    return "triton" if "triton_kernels" in getattr(kernel, "__module__", "") else "eager"


# The shape is known and wanted, however small the parts are.
_NO_LIMIT = 2**62
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
