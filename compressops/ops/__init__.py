"""One public function an op; see ``compressops/schema.py`` for the list."""

from .huffman_decode import huffman_decode
from .int8_linear import int8_linear, int8_linear_pack, quantize_rows
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

__all__ = [
    "choose_tile",
    "cook_toom",
    "huffman_decode",
    "int8_linear",
    "int8_linear_pack",
    "quantize_rows",
    "winograd_conv1d",
    "winograd_conv2d",
    "winograd_conv2d_grad",
    "winograd_conv2d_pack",
    "winograd_conv2d_reference",
    "winograd_conv2d_unpack",
    "winograd_conv2d_weight_grad",
]
