"""Quantization of what a transformer's attention multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compressops.compress import checks
from compressops.compress.activations import check_inputs, quantizer
from compressops.compress.select import match
from compressops.compress.stage import Stage
from compressops.formats.number import Number
from compressops.nn.attention import AttentionQuantizer, attach, attention_layers, switch


@dataclass(frozen=True)
class QuantizeAttention(Stage):
    """Round query, key, attention probabilities and value of a model of transformers to
    ``number``, with straight-through gradients (TernaryBERT, Zhang et al. 2020, arXiv:2009.12812,
    section 3.1).

    The model's attention implementation becomes ``"compressops"``, which computes as ``"eager"``
    does. What `convert` and `load` return rounds in the same way; its products are still of floats.

    Args:
        number: `Int` without groups, min–max (``symmetric=False``) or symmetric; with running
            ranges any number that inputs can have.
        layers, exclude: globs over the names of the attention modules.
        ranges: ``"rows"``: each row (last dimension: of query, key and value a head's vector, of
            probabilities those of one query) has its own, which no padding changes. ``"running"``:
            one for a tensor, which follows a running minimum and maximum during `Retrain`.
        calibration: batches of training data that running ranges start from.
    """

    number: Number
    layers: str | tuple[str, ...] = "*"
    exclude: str | tuple[str, ...] = ()
    ranges: str = "rows"
    calibration: int = 4

    main_field: ClassVar[str | None] = "number"

    def __post_init__(self) -> None:
        check_inputs("number", self.number, self.ranges)
        checks.integer("calibration", self.calibration, 1)
        object.__setattr__(self, "layers", checks.globs("layers", self.layers))
        object.__setattr__(self, "exclude", checks.globs("exclude", self.exclude))

    @property
    def observes(self) -> int:
        return self.calibration if self.ranges == "running" else 0

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        self._selected(model)

    def attach(self, model: nn.Module) -> None:
        for module in self._selected(model).values():
            device = next(module.parameters()).device
            parts = [quantizer(self.number, self.ranges) for _ in AttentionQuantizer.parts]
            attach(module, AttentionQuantizer(*parts).to(device))
        switch(model)

    def _selected(self, model: nn.Module) -> dict[str, nn.Module]:
        found = attention_layers(model)
        if not found:
            raise ValueError(
                f"the {type(model).__name__} has no attention that calls transformers' functions"
            )
        chosen = match("layers", self.layers, found)
        chosen -= match("exclude", self.exclude, found)
        if not chosen:
            raise ValueError(
                f"layers={self.layers!r} with exclude={self.exclude!r} leaves no attention of "
                f"{', '.join(found)}"
            )
        return {name: module for name, module in found.items() if name in chosen}
