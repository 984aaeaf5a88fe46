"""One public function an op; see ``compressops/schema.py`` for the list."""

from ..formats.coding import Decoder
from .bsr import bsr_from_dense, bsr_to_dense
from .bsr_conv2d import bsr_conv2d
from .bsr_int8_linear import bsr_int8_linear, bsr_int8_linear_pack
from .bsr_linear import bsr_linear, bsr_linear_pack
from .bsr_linear_grad import bsr_linear_grad_values, bsr_linear_grad_x
from .bsr_row_order import bsr_row_order
from .huffman_decode import huffman_decode, huffman_decode_out
from .huffman_decode_planes import huffman_decode_planes
from .huffman_encode import huffman_encode
from .huge_pages import empty_on_huge_pages
from .int4_linear import int4_linear, int4_linear_pack
from .int8_conv2d import int8_conv2d, int8_conv2d_pack
from .int8_linear import int8_linear, int8_linear_pack, quantize_rows
from .merge_planes import merge_planes
from .pack_panels import pack_panels
from .round_rows import round_rows
from .ternary_linear import ternary_linear, ternary_linear_pack, ternary_linear_rows
from .winograd_conv2d import (
    winograd_conv1d,
    winograd_conv2d,
    winograd_conv2d_pack,
    winograd_conv2d_reference,
    winograd_conv2d_unpack,
)
from .winograd_conv2d_grad import winograd_conv2d_grad, winograd_conv2d_weight_grad
from .winograd_model import choose_tile
from .winograd_transform import cook_toom

# What `PackedTensor.unpack` takes to decode by the ops.
DECODER = Decoder(huffman_decode, merge_planes, huffman_decode_planes, empty_on_huge_pages)

__all__ = [
    "DECODER",
    "bsr_conv2d",
    "bsr_from_dense",
    "bsr_int8_linear",
    "bsr_int8_linear_pack",
    "bsr_linear",
    "bsr_linear_grad_values",
    "bsr_linear_grad_x",
    "bsr_linear_pack",
    "bsr_row_order",
    "bsr_to_dense",
    "choose_tile",
    "cook_toom",
    "huffman_decode",
    "huffman_decode_out",
    "huffman_decode_planes",
    "huffman_encode",
    "int4_linear",
    "int4_linear_pack",
    "int8_conv2d",
    "int8_conv2d_pack",
    "int8_linear",
    "int8_linear_pack",
    "merge_planes",
    "pack_panels",
    "quantize_rows",
    "round_rows",
    "ternary_linear",
    "ternary_linear_pack",
    "ternary_linear_rows",
    "winograd_conv1d",
    "winograd_conv2d",
    "winograd_conv2d_grad",
    "winograd_conv2d_pack",
    "winograd_conv2d_reference",
    "winograd_conv2d_unpack",
    "winograd_conv2d_weight_grad",
]
