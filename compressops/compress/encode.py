"""Lossless coding of the packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compressops.compress import checks
from compressops.compress.parametrizations import Coded, find, register
from compressops.compress.select import select, tied_groups
from compressops.compress.stage import Stage
from compressops.formats.coding import Coding


@dataclass(frozen=True)
class Encode(Stage):
    """Pack the selected layers with ``coding``. Changes no weight.

    Args:
        coding: a member of the coding axis.
        layers, exclude: globs over the names of the layers.
    """

    coding: Coding
    layers: str | tuple[str, ...] = "*"
    exclude: str | tuple[str, ...] = ()

    lossless: ClassVar[bool] = True
    main_field: ClassVar[str | None] = "coding"

    def __post_init__(self) -> None:
        if not isinstance(self.coding, Coding):
            known = ", ".join(sorted(Coding.members))
            raise TypeError(f"coding must be one of {known}, got {self.coding!r}")
        object.__setattr__(self, "layers", checks.globs("layers", self.layers))
        object.__setattr__(self, "exclude", checks.globs("exclude", self.exclude))

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        select(model, self.layers, self.exclude)

    def attach(self, model: nn.Module) -> None:
        for group in tied_groups(select(model, self.layers, self.exclude)):
            coded = find(group[0], Coded)
            if coded is None:
                coded = Coded(self.coding)
                for module in group:
                    register(module, coded)
            else:
                coded.coding = self.coding
