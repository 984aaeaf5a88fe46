"""Argument checks of the recipe's dataclasses: every message names the argument and the value."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """``value`` must be a finite real number between ``low`` and ``high``."""
    interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in {interval}, got {value!r}")
    inside = (value > low if open_low else value >= low) and (
        value < high if open_high else value <= high
    )
    if not math.isfinite(value) or not inside:
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def integer(name: str, value: Any, low: int = 0, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value!r}")


def choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def globs(name: str, value: Any) -> str | tuple[str, ...]:
    """One string as it is, several as a tuple."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (tuple, list)) or not all(isinstance(i, str) for i in value):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    return tuple(value)
