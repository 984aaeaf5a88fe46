"""What every stage of a recipe is: a frozen dataclass that changes the structure of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn


class Controller(Protocol):
    """Something that acts on the model while it is being retrained.

    ``begin`` is called before the first step and after a resume, with the number of optimizer
    steps done; ``update`` after each step. Both must depend on their arguments and on the state
    of the model (and of the optimizer) alone, so that a resumed run goes the same way.
    """

    def begin(
        self,
        model: nn.Module,
        step: int,
        total_steps: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None: ...
    def update(self, model: nn.Module, step: int, total_steps: int, epoch_ends: bool) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One step of a `Recipe`."""

    # Part of a stage checkpoint's identity: raise it when a stage computes something else.
    version: ClassVar[int] = 1
    # The stage keeps the function of the model, so its accuracy needs no new measurement.
    lossless: ClassVar[bool] = False
    # The field that YAML may give as a bare {TypeName: {…}}.
    main_field: ClassVar[str | None] = None

    @property
    def observes(self) -> int:
        """Batches of training data that its quantizers' ranges start from."""
        return 0

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        """Raise ValueError if the stage cannot work on ``model`` (before any work is done)."""

    def attach(self, model: nn.Module) -> None:
        """Change ``model`` in place. Deterministic, and without data: restoring replays it."""

    def controller(self) -> Controller | None:
        """What the stage wants to do during the next `Retrain`."""
        return None

    def __str__(self) -> str:
        return _call(self)

    @property
    def label(self) -> str:
        """The stage in a few words, for tables: its name and its main argument."""
        main = getattr(self, self.main_field) if self.main_field else None
        return type(self).__name__ if main is None else f"{type(self).__name__} {_brief(main)}"


def _call(value: Any) -> str:
    """A dataclass with the fields that are not the defaults, in order."""
    shown = [
        f"{field.name}={_brief(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return _call(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_brief, value))}]"
    return str(value)
