"""Drop-in modules that hold packed weights."""

from compressops.nn.base import PackedModule
from compressops.nn.conv import PackedConv1d, PackedConv2d
from compressops.nn.embedding import PackedEmbedding
from compressops.nn.linear import Int8Linear, PackedLinear
from compressops.nn.weight import PackedWeight

__all__ = [
    "Int8Linear",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PackedModule",
    "PackedWeight",
]
