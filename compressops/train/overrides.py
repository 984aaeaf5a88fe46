"""Modules of a model that do one thing in another way for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def overridden(
    models: Iterable[nn.Module], method: str, replacement: Callable[[nn.Module], Callable | None]
) -> Iterator[list[str]]:
    """Within the ``with`` block the modules of ``models`` call what ``replacement`` gives for them
    as their ``method``. Those that it gives ``None`` for, and those that have one of their own
    instead of their class's, stay as they are.

    Yields:
        The names of the modules concerned.
    """
    changed: list[nn.Module] = []
    names = []
    try:
        for model in models:
            for name, module in model.named_modules():
                function = None if method in vars(module) else replacement(module)
                if function is not None:
                    setattr(module, method, function)
                    changed.append(module)
                    names.append(name)
        yield names
    finally:
        for module in changed:
            delattr(module, method)
