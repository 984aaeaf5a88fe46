"""What every stage of a recipe is: a frozen dataclass that changes the structure of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn


class Controller(Protocol):
    """Something that acts on the model while it is being retrained.

    ``begin`` is called before the first step and after a resume, with the number of optimizer
    steps done; ``update`` after each step. Both must depend on their arguments and on the state
    of the model alone, so that a resumed run goes the same way.
    """

    def begin(self, model: nn.Module, step: int, total_steps: int) -> None: ...
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

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        """Raise ValueError if the stage cannot work on ``model`` (before any work is done)."""

    def attach(self, model: nn.Module) -> None:
        """Change ``model`` in place. Deterministic, and without data: restoring replays it."""

    def controller(self) -> Controller | None:
        """What the stage wants to do during the next `Retrain`."""
        return None

    def __str__(self) -> str:
        """The arguments that are not the defaults, in the order of the fields."""
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                shown.append(f"{field.name}={_brief(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_brief, value))}]"
    return str(value)
