"""Drop-in modules: those that hold packed weights, and convolutions that run as Winograd's."""

from compressops.nn.attention import AttentionQuantizer
from compressops.nn.base import PackedModule
from compressops.nn.block_sparse import (
    BlockSparseConv2d,
    BlockSparseInt8Linear,
    BlockSparseLinear,
)
from compressops.nn.conv import PackedConv1d, PackedConv2d
from compressops.nn.embedding import IntEmbedding, PackedEmbedding, TernaryEmbedding
from compressops.nn.fused import Fused
from compressops.nn.int8_conv import Int8Conv2d
from compressops.nn.linear import PackedLinear
from compressops.nn.lowrank import LowRankConv2d, LowRankLinear
from compressops.nn.lowrank_integer import LowRankIntegerLinear
from compressops.nn.quantized_linear import Int4Linear, Int8Linear, TernaryLinear
from compressops.nn.weight import PackedWeight
from compressops.nn.winograd import Winograd
from compressops.nn.winograd_conv import WinogradConv1d, WinogradConv2d

__all__ = [
    "AttentionQuantizer",
    "BlockSparseConv2d",
    "BlockSparseInt8Linear",
    "BlockSparseLinear",
    "Fused",
    "Int4Linear",
    "Int8Conv2d",
    "Int8Linear",
    "IntEmbedding",
    "LowRankConv2d",
    "LowRankIntegerLinear",
    "LowRankLinear",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PackedModule",
    "PackedWeight",
    "TernaryEmbedding",
    "TernaryLinear",
    "Winograd",
    "WinogradConv1d",
    "WinogradConv2d",
]
