"""Quantization of weights and layer inputs, with straight-through gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressops.compress import checks
from compressops.compress.parametrizations import (
    FakeQuantize,
    _StraightThrough,
    find,
    input_of,
    register,
)
from compressops.compress.select import select, tied_groups
from compressops.compress.stage import Stage
from compressops.formats.groupwise import Int, Ternary
from compressops.formats.number import FixedPoint, Number


@dataclass(frozen=True)
class Quantize(Stage):
    """Write the weights of the selected layers in ``number``.

    From here on ``module.weight`` holds only values of that number, and a following `Retrain`
    trains through it by a straight-through gradient. A layer that is quantized already changes to
    the new number.

    Args:
        number: a member of the number axis. ``FixedPoint(integer_bits=None)`` gets one integer
            length, fitted over all selected layers together.
        layers, exclude: globs over the names of the layers.
        activations: a number for the layers' inputs too, or ``None``; an embedding, whose inputs
            are indices, has none, and must not be named in ``layers``. Its range follows a running
            minimum and maximum during `Retrain`; before, it comes from ``calibration`` batches.
        refit: when `Retrain` fits the parameters anew to the weights: ``"never"``, ``"epoch"``,
            ``"step"``, or ``"auto"``: scales (`Int`, `Ternary`) at each step, integer lengths
            (`FixedPoint`, `DynamicFixedPoint`) never, because a jump by a factor of two throws
            away what was learnt, and `FixedPoint`'s belongs to the whole network.
        calibration: batches of training data that the inputs' ranges start from.
    """

    number: Number
    layers: str | tuple[str, ...] = "*"
    exclude: str | tuple[str, ...] = ()
    activations: Number | None = None
    refit: str = "auto"
    calibration: int = 4

    main_field: ClassVar[str | None] = "number"

    def __post_init__(self) -> None:
        if not isinstance(self.number, Number):
            raise TypeError(f"number must be one of {_known()}, got {self.number!r}")
        if self.activations is not None:
            _check_activations(self.activations)
        checks.choice("refit", self.refit, ("auto", "never", "epoch", "step"))
        if self.refit in ("epoch", "step") and isinstance(self.number, FixedPoint):
            raise ValueError(
                f"refit={self.refit!r} does not go with {self.number}: "
                "its integer length is one for the whole network"
            )
        checks.integer("calibration", self.calibration, 1)
        object.__setattr__(self, "layers", checks.globs("layers", self.layers))
        object.__setattr__(self, "exclude", checks.globs("exclude", self.exclude))

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        found = select(model, self.layers, self.exclude)
        if self.activations is None:
            return
        for name, module in found.items():
            if getattr(module, "is_factor", False):
                raise ValueError(
                    f"activations={self.activations}: {name!r} is a factor, whose input is no "
                    f"layer's; quantize factors in a stage without activations"
                )
        indexed = [name for name, module in found.items() if isinstance(module, nn.Embedding)]
        globs = (self.layers,) if isinstance(self.layers, str) else self.layers
        for name in indexed:
            if name in globs or len(indexed) == len(found):
                raise ValueError(
                    f"activations={self.activations}: the inputs of layer {name!r} are indices, "
                    f"not numbers; quantize it in a stage without activations"
                )

    def attach(self, model: nn.Module) -> None:
        groups = tied_groups(select(model, self.layers, self.exclude))
        dense = []
        for module, *_ in groups:
            existing = find(module, FakeQuantize)
            # What is quantized anew starts from the trained weight, not from its old codes.
            dense.append((input_of(module, existing) if existing else module.weight).detach())
        number = self.number.for_network(dense)
        scaled = isinstance(number, (Int, Ternary))
        refit = ("step" if scaled else "never") if self.refit == "auto" else self.refit
        for group, weight in zip(groups, dense, strict=True):
            params = number.fit(weight)
            quantized = find(group[0], FakeQuantize)
            if quantized is None:
                quantized = FakeQuantize(number, params, refit)
                # One for all that share the weight, so that they cannot part.
                for module in group:
                    register(module, quantized)
            else:
                quantized.set_number(number, params, refit)
            for module in group:
                if self.activations is not None and not isinstance(module, nn.Embedding):
                    attach_input_quantizer(module, self.activations)


class Refit:
    """Fits the parameters of every `FakeQuantize` anew, as often as each asks for."""

    def begin(self, model: nn.Module, step: int, total_steps: int) -> None:
        self.layers = [
            (module, quantized)
            for module in model.modules()
            if (quantized := find(module, FakeQuantize)) is not None and quantized.refit != "never"
        ]

    def update(self, model: nn.Module, step: int, total_steps: int, epoch_ends: bool) -> None:
        for module, quantized in self.layers:
            if quantized.refit == "step" or epoch_ends or step == total_steps:
                quantized.fit(input_of(module, quantized))


class InputQuantizer(nn.Module):
    """Quantizes a layer's input with one range per tensor.

    Args:
        number: a member of the number axis.
        momentum: weight of a batch in the running minimum and maximum.

    Shape: any float tensor to the same shape and dtype. Until a range was observed the input
    passes unchanged. In training mode each call moves the range.
    """

    def __init__(self, number: Number, momentum: float = 0.1) -> None:
        super().__init__()
        self.number = number
        self.momentum = momentum
        # (minimum, maximum), and whether they were ever observed.
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("observed", torch.zeros((), dtype=torch.bool))

    def params(self) -> dict[str, Tensor]:
        """The number's parameters for the running range; scales are of one row."""
        return self.number.fit(self.range[None])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x.detach())
        if not self.observed:
            return x
        return _StraightThrough.apply(x.reshape(1, -1), self.number, self.params()).view_as(x)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        new = torch.stack([x.min(), x.max()]).float()
        if self.observed:
            self.range.lerp_(new, self.momentum)
        else:
            self.range.copy_(new)
            self.observed.fill_(True)

    def get_extra_state(self) -> dict[str, Any]:
        return {"number": self.number.to_spec(), "momentum": self.momentum}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.number = Number.from_spec(state["number"])
        self.momentum = state["momentum"]

    def extra_repr(self) -> str:
        return f"{self.number}, momentum={self.momentum}"


def attach_input_quantizer(module: nn.Module, number: Number) -> InputQuantizer:
    """Let ``module``'s first input pass through an `InputQuantizer`, its child ``input_quantizer``.

    The hook is a plain function that finds the quantizer in the module, so that copying and
    pickling the module keep the two together.
    """
    if not hasattr(module, "input_quantizer"):
        module.register_forward_pre_hook(quantize_first_input)
    weight = module.parametrizations["weight"].original
    module.input_quantizer = InputQuantizer(number).to(weight.device)
    module.input_quantizer.train(module.training)
    return module.input_quantizer


def quantize_first_input(module: nn.Module, args: tuple) -> tuple:
    """The forward pre-hook of a layer with an input quantizer."""
    return (module.input_quantizer(args[0]), *args[1:])


def _check_activations(number: Number) -> None:
    if not isinstance(number, Number):
        raise TypeError(f"activations must be one of {_known()}, got {number!r}")
    if isinstance(number, Ternary):
        raise ValueError(f"activations={number}: inputs cannot be ternary")
    if isinstance(number, FixedPoint) and number.integer_bits is None:
        raise ValueError(
            f"activations={number} needs integer_bits; DynamicFixedPoint fits them by layer"
        )
    if isinstance(number, Int) and number.group_size is not None:
        raise ValueError(f"activations={number}: inputs have one range, group_size must be None")


def _known() -> str:
    return ", ".join(sorted(Number.members))
