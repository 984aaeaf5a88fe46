"""What every drop-in module shares: the layer's options, a packed weight and a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressops import backends, ops
from compressops.formats import Dense, Float, Int, Layout, PackedTensor, Raw
from compressops.nn.weight import PackedWeight
from compressops.schema import SCHEMAS


class PackedModule(nn.Module):
    """Base of the drop-in modules: options of the layer, a `PackedWeight`, a bias.

    With ``residency="decoded"`` every one of them compiles into one graph. With ``"packed"`` the
    decoding stays outside: the graph breaks at the layer, and ``torch.compile(fullgraph=True)``
    raises.

    A subclass names its float layer (``source``), the constructor arguments that it takes over
    (``options``) and those of its own (``settings``), and has a ``forward``.
    """

    source: ClassVar[type[nn.Module]]
    options: ClassVar[tuple[str, ...]]  # first the features of an input, where an op runs
    dimensions: ClassVar[int] = 0  # of an input, after its features
    # How to run, of JSON values. Keyword arguments of the constructor, from_float, from_module;
    # one that is not given is the replaced module's, or None.
    settings: ClassVar[tuple[str, ...]] = ()
    weight_type: ClassVar[type[PackedWeight]] = PackedWeight
    # The integers in which the op itself can write each row of its input.
    row_numbers: ClassVar[tuple[Int, ...]] = ()
    # The layout that `from_float` takes unless another is given.
    layout: ClassVar[Layout] = Dense()
    # The op that runs instead of the float layer's own kernel, if one does.
    op: str | None = None

    def __init__(self, module: nn.Module, weight: PackedWeight, **settings: Any) -> None:
        super().__init__()
        if unknown := settings.keys() - set(self.settings):
            raise TypeError(
                f"{type(self).__name__} has the settings {self.settings}, got {sorted(unknown)}"
            )
        if not isinstance(weight, self.weight_type):
            raise TypeError(
                f"weight: {type(self).__name__} needs a {self.weight_type.__name__}, got a "
                f"{type(weight).__name__}"
            )
        if tuple(weight.shape) != tuple(module.weight.shape):
            raise ValueError(
                f"weight: {type(self).__name__} needs shape {tuple(module.weight.shape)}, got a "
                f"packed tensor of {tuple(weight.shape)}"
            )
        for name in self.options:
            setattr(self, name, getattr(module, name))
        for name in self.settings:
            setattr(self, name, settings.get(name, getattr(module, name, None)))
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
        **settings: Any,
    ) -> PackedModule:
        """Pack a float layer's weight.

        Args:
            module: a layer of this class's ``source`` type; its bias is shared, not copied.
            layout: of `compressops.formats`; ``None`` is the class's, ``Dense()`` for most.
            number: ``None`` is ``Float()`` of the weight's dtype.
            coding: ``None`` is ``Raw()``.
            residency: ``"decoded"`` or ``"packed"``.
            lossy: quantize the weight; ``False`` demands that it already is on the number's grid.
            settings: those of the class.

        Raises:
            TypeError: ``module`` is of another type.
            ValueError: the weight does not fit the choice.
        """
        weight = module.weight.detach()
        packed = PackedTensor.pack(
            weight,
            layout or cls.layout,
            number or Float(str(weight.dtype).removeprefix("torch.")),
            coding or Raw(),
            lossy=lossy,
            encoder=ops.huffman_encode,
        )
        return cls.from_module(module, packed, residency, **settings)

    @classmethod
    def replaces(cls, kind: type[nn.Module]) -> bool:
        """Whether a layer of this type can give its place to one of this class: the float layer
        can, and so can every packed module that stands for it."""
        source = kind.source if issubclass(kind, PackedModule) else kind
        return issubclass(source, cls.source)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        packed: PackedTensor | PackedWeight,
        residency: str = "decoded",
        **settings: Any,
    ) -> PackedModule:
        """A layer with ``module``'s options and bias that runs ``packed`` as its weight.

        Args:
            module: a layer of this class's ``source`` type, or one that replaces such a layer.
        """
        if not cls.replaces(type(module)):
            raise TypeError(
                f"module: {cls.__name__} replaces a {cls.source.__name__}, got a "
                f"{type(module).__name__}"
            )
        if not isinstance(packed, PackedWeight):
            packed = cls.weight_type(packed, residency, like=module.weight.detach())
        return cls(module, packed, **settings)

    @classmethod
    def from_packed(
        cls,
        config: dict[str, Any],
        packed: dict[str, PackedTensor],
        residency: str = "decoded",
        input_quantizer: nn.Module | None = None,
    ) -> PackedModule:
        """Build from `get_config()` and `packed_tensors()`; the bias is zero.

        Args:
            config: JSON values.
            packed: ``{"weight": …}``.
            residency: ``"decoded"`` or ``"packed"``.
            input_quantizer: the module that ``config["input_quantizer"]``, if there, describes.

        Raises:
            ValueError: a key of ``config`` is missing, unknown or has no valid value, the shapes
                disagree, or the input quantizer is missing.
        """
        config = dict(config)
        if ("input_quantizer" in config) != (input_quantizer is not None):
            raise ValueError(
                f"config of {cls.__name__} has input_quantizer="
                f"{config.get('input_quantizer')}, and the module given is {input_quantizer}"
            )
        config.pop("input_quantizer", None)
        expected = {"type", "bias", *cls.options}
        settings = {name: config.pop(name) for name in cls.settings if name in config}
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
        new = cls(module.to(weight.dtype), cls.weight_type(weight, residency), **settings)
        new.input_quantizer = input_quantizer
        return new

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
        given = {name: getattr(self, name) for name in self.settings}
        config |= {name: value for name, value in given.items() if value is not None}
        config["bias"] = self.bias is not None
        if self.input_quantizer is not None:
            config["input_quantizer"] = self.input_quantizer.get_extra_state()
        return config

    @property
    def weight(self) -> Tensor:
        """The dense weight, as the float layer has it (decoded on each access if packed)."""
        # On each call of the layer, so not through Module's __getattr__ and __call__, which take
        # a microsecond each.
        held = self._modules["packed_weight"]
        decoded = held._buffers.get("decoded")
        return held() if decoded is None else decoded

    def with_weight(self, function: Callable[..., Tensor], input: Tensor, *args: Any) -> Tensor:
        """``function(input, *weight, *args)`` with the weight as the function takes it (the dense
        one, or the arguments of an op), for as long as that takes."""
        held = self._modules["packed_weight"]
        if held.residency == "decoded":
            return function(input, *held.kernel(), *args)
        return held.run(function, input, *args)

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

    def quantize_rows(self, number: Int) -> None:
        """Let the op write each row of its input in ``number``, one of `row_numbers`."""
        if number not in self.row_numbers:
            raise ValueError(
                f"number: {type(self).__name__} writes rows in one of "
                f"{[str(known) for known in self.row_numbers]}, got {number}"
            )

    def taken(self, input: Tensor) -> Tensor:
        """``input`` as an op is to take it: through the layer's quantizer, and cast as autocast,
        where it is on, casts the arguments of torch's own kernel: float64 stays.

        Raises:
            ValueError: it has not as many features as the layer. An op cannot tell: its weight is
                padded.
        """
        at, name = -1 - self.dimensions, self.options[0]
        if input.dim() > self.dimensions and input.shape[at] != getattr(self, name):
            raise ValueError(
                f"input must have {name} = {getattr(self, name)} at dimension {at}, got shape "
                f"{list(input.shape)}"
            )
        input = self.quantize_input(input)
        kind = input.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return input
        casts = input.is_floating_point() and input.dtype != torch.float64
        return input.to(torch.get_autocast_dtype(kind)) if casts else input

    def backend(self) -> str:
        """What runs the layer: ``"torch"``, or the backend of its op."""
        # Factors and look-ups have names here too, but no kernels to choose from.
        known = self.op in SCHEMAS
        return backends.name(self.op, self.packed_weight.device.type) if known else "torch"

    def assumed_faster(self) -> str | None:
        """Why this layer is taken for faster than the dense one where nothing is measured, though
        it runs torch's kernels; ``None``: it is not."""
        return None

    def extra_repr(self) -> str:
        config = self.get_config()
        shown = [f"{k}={v}" for k, v in config.items() if k not in ("type", "input_quantizer")]
        return ", ".join([*shown, *self.packed_weight.described(), f"residency={self.residency!r}"])
