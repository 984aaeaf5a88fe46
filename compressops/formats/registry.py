"""The allow-list of each axis: the only way from a name in a file or recipe to a class."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any, ClassVar, TypeVar

A = TypeVar("A", bound="Axis")


class UnknownTypeError(ValueError):
    """A type name that is not on the allow-list."""


class Axis:
    """Base of layouts, numbers and codings: frozen dataclasses that travel as small JSON objects.

    A direct subclass opens an axis of its own; every further subclass is a member of that axis
    under its class name, unless that begins with an underscore.
    """

    members: ClassVar[dict[str, type]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Axis in cls.__bases__:
            cls.members = {}
        elif not cls.__name__.startswith("_"):
            cls.members[cls.__name__] = cls

    @classmethod
    def axis_name(cls) -> str:
        """``"number"``, ``"layout"`` or ``"coding"``, for messages."""
        return next(c for c in cls.__mro__ if Axis in c.__bases__).__name__.lower()

    @classmethod
    def resolve(cls: type[A], name: str) -> type[A]:
        """The member called ``name``.

        Raises:
            UnknownTypeError: no such member; the message lists those that exist.
        """
        if not isinstance(name, str) or name not in cls.members:
            raise UnknownTypeError(
                f"unknown {cls.axis_name()} {shown(name)}: "
                f"known are {', '.join(sorted(cls.members))}"
            )
        return cls.members[name]

    @classmethod
    def from_spec(cls: type[A], spec: dict[str, Any]) -> A:
        """The member that ``to_spec`` described.

        Raises:
            ValueError: not an object with a known ``type``, an unknown field, or a field out of
                range.
        """
        if not isinstance(spec, dict) or "type" not in spec:
            raise ValueError(
                f"{cls.axis_name()} must be an object with a 'type', got {shown(spec)}"
            )
        member = cls.resolve(spec["type"])
        known = {field.name for field in dataclasses.fields(member)}
        values = {key: value for key, value in spec.items() if key != "type"}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"{member.__name__} has no field {shown(unknown[0])}: "
                f"known are {', '.join(sorted(known)) or 'none'}"
            )
        try:
            return member(**values)
        except TypeError as error:  # a field without a default is missing
            raise ValueError(f"{cls.axis_name()} {shown(spec)}: {error}") from None

    def __str__(self) -> str:
        """The class name and the fields that are not their defaults: ``Int(bits=4)``."""
        values = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return type(self).__name__ + (f"({', '.join(values)})" if values else "")

    def to_spec(self) -> dict[str, Any]:
        """``{"type": class name, field: value, …}``, JSON-serialisable; every field is written.

        Defaults are written too, so that changing one never changes the meaning of a stored file.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"type": type(self).__name__, **listed}


def shown(value: object) -> str:
    """``repr(value)``, cut where it is long: a file can hold numbers of thousands of digits and
    lists of millions of them, which no message should repeat."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 20
_SHORT.maxstring = _SHORT.maxother = 200


def check_int(owner: str, name: str, value: object, low: int, high: int) -> int:
    """``value`` if it is an int within ``[low, high]``, else a ``ValueError`` that says so."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{owner}: {name} must be an integer from {low} to {high}, got {shown(value)}"
        )
    return value


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of ``choices``, else a ``ValueError`` that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(choices)}, got {shown(value)}")
    return value


def check_fraction(owner: str, name: str, value: object, low: float, high: float) -> float:
    """``value`` as a float if it is a number within ``[low, high)``, else a ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(f"{owner}: {name} must be a number in [{low}, {high}), got {shown(value)}")
    return float(value)
