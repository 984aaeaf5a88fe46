"""The three axes of a packed weight, layout × number × coding, and the weight itself."""

from compressops.formats.coding import Coding, Huffman, Raw
from compressops.formats.groupwise import Int
from compressops.formats.layout import BlockSparse, Dense, Layout, Sparse
from compressops.formats.lowrank import LowRank
from compressops.formats.number import DynamicFixedPoint, FixedPoint, Float, Number
from compressops.formats.packed import PackedTensor
from compressops.formats.ternary import Ternary

__all__ = [
    "BlockSparse",
    "Coding",
    "Dense",
    "DynamicFixedPoint",
    "FixedPoint",
    "Float",
    "Huffman",
    "Int",
    "Layout",
    "LowRank",
    "Number",
    "PackedTensor",
    "Raw",
    "Sparse",
    "Ternary",
]
