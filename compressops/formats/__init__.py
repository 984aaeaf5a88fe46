"""The three axes of a packed weight: layout, number and coding."""

from compressops.formats.groupwise import Int, Ternary
from compressops.formats.number import DynamicFixedPoint, FixedPoint, Float, Number

__all__ = ["DynamicFixedPoint", "FixedPoint", "Float", "Int", "Number", "Ternary"]
