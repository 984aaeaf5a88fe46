"""Quantization of weights and layer inputs, with straight-through gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressops.compress import checks
from compressops.compress.activations import RANGES, attach_input_quantizer, check_inputs
from compressops.compress.parametrizations import FakeQuantize, find, input_of, register
from compressops.compress.retrain import Retrain
from compressops.compress.select import select, tied_groups
from compressops.compress.stage import Stage
from compressops.formats.groupwise import Int
from compressops.formats.number import FixedPoint, Number
from compressops.formats.ternary import Ternary


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
            are indices, has none, and must not be named in ``layers``.
        ranges: of the inputs. ``"running"``: one, which follows a running minimum and maximum
            during `Retrain`; before, it comes from ``calibration`` batches. ``"rows"``: each row
            (last dimension) has its own, for `Int`: what `Int8Linear`, `Int4Linear` and
            `TernaryLinear` compute with, so that `convert` takes them without being asked.
        refit: when `Retrain` fits the parameters anew to the weights: ``"never"``, ``"epoch"``,
            ``"step"``, or ``"auto"``: scales (`Int`, `Ternary`) at each step, integer lengths
            (`FixedPoint`, `DynamicFixedPoint`) never, because a jump by a factor of two throws
            away what was learnt, and `FixedPoint`'s belongs to the whole network.
        calibration: batches of training data that the inputs' running ranges start from.
        loss_aware: fit ``Ternary(threshold=None)`` to what the loss makes of errors (LAT; Hou &
            Kwok 2018, arXiv:1802.08635): each entry's counts by the square root of Adam's second
            moment, so the next `Retrain` must have ``optimizer="adamw"``.
        solver: of ``Ternary(threshold=None)`` in `Retrain`: ``"exact"``, one sort of the weight
            each time, or ``"alternating"`` from the scales before, which costs less.
    """

    number: Number
    layers: str | tuple[str, ...] = "*"
    exclude: str | tuple[str, ...] = ()
    activations: Number | None = None
    refit: str = "auto"
    ranges: str = "running"
    calibration: int = 4
    loss_aware: bool = False
    solver: str = "exact"

    main_field: ClassVar[str | None] = "number"

    def __post_init__(self) -> None:
        if not isinstance(self.number, Number):
            known = ", ".join(sorted(Number.members))
            raise TypeError(f"number must be one of {known}, got {self.number!r}")
        if self.activations is not None or self.ranges == "rows":
            check_inputs("activations", self.activations, self.ranges)
        checks.choice("ranges", self.ranges, RANGES)
        checks.choice("solver", self.solver, ("exact", "alternating"))
        if not isinstance(self.loss_aware, bool):
            raise TypeError(f"loss_aware must be True or False, got {self.loss_aware!r}")
        if (self.loss_aware or self.solver != "exact") and not _is_nearest(self.number):
            raise ValueError(
                f"loss_aware and solver go with Ternary(threshold=None), got {self.number}"
            )
        checks.choice("refit", self.refit, ("auto", "never", "epoch", "step"))
        if self.refit in ("epoch", "step") and isinstance(self.number, FixedPoint):
            raise ValueError(
                f"refit={self.refit!r} does not go with {self.number}: "
                "its integer length is one for the whole network"
            )
        checks.integer("calibration", self.calibration, 1)
        object.__setattr__(self, "layers", checks.globs("layers", self.layers))
        object.__setattr__(self, "exclude", checks.globs("exclude", self.exclude))

    @property
    def refits(self) -> str:
        """``refit``, with what ``"auto"`` stands for."""
        if self.refit != "auto":
            return self.refit
        return "step" if isinstance(self.number, (Int, Ternary)) else "never"

    @property
    def observes(self) -> int:
        return self.calibration if self.activations and self.ranges == "running" else 0

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        found = select(model, self.layers, self.exclude)
        training = [stage for stage in later if isinstance(stage, Retrain)]
        if self.loss_aware and training and training[0].optimizer != "adamw":
            raise ValueError(
                f"loss_aware needs Adam's second moments, and the next Retrain has "
                f"optimizer={training[0].optimizer!r}"
            )
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
        fitting = (self.refits, self.solver if _is_nearest(number) else None, self.loss_aware)
        for group, weight in zip(groups, dense, strict=True):
            params = number.fit(weight)
            quantized = find(group[0], FakeQuantize)
            if quantized is None:
                quantized = FakeQuantize(number, params, *fitting)
                # One for all that share the weight, so that they cannot part.
                for module in group:
                    register(module, quantized)
            else:
                quantized.set_number(number, params, *fitting)
            for module in group:
                if self.activations is not None and not isinstance(module, nn.Embedding):
                    attach_input_quantizer(module, self.activations, self.ranges)


class Refit:
    """Fits the parameters of every `FakeQuantize` anew, as often as each asks for."""

    @staticmethod
    def concerns(model: nn.Module) -> list[tuple[nn.Module, FakeQuantize]]:
        """The layers whose parameters it fits."""
        return [
            (module, quantized)
            for module in model.modules()
            if (quantized := find(module, FakeQuantize)) is not None and quantized.refit != "never"
        ]

    def begin(
        self,
        model: nn.Module,
        step: int,
        total_steps: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.layers = self.concerns(model)

    def update(self, model: nn.Module, step: int, total_steps: int, epoch_ends: bool) -> None:
        for module, quantized in self.layers:
            if quantized.refit == "step" or epoch_ends or step == total_steps:
                curvature = self._curvature(module) if quantized.loss_aware else None
                quantized.fit(input_of(module, quantized), curvature)

    def _curvature(self, module: nn.Module) -> Tensor | None:
        """√v of Adam, the diagonal that LAT takes for the Hessian; ``None`` before the weight has
        had a gradient."""
        original = module.parametrizations["weight"].original
        state = {} if self.optimizer is None else self.optimizer.state.get(original, {})
        if state and "exp_avg_sq" in state:
            return state["exp_avg_sq"].sqrt()
        if state or self.optimizer is None:
            raise ValueError(
                f"loss_aware needs an optimizer with Adam's second moments, got "
                f"{type(self.optimizer).__name__}"
            )
        return None


def _is_nearest(number: Number) -> bool:
    return isinstance(number, Ternary) and number.threshold is None
