"""One public function an op; see ``compressops/schema.py`` for the list."""

from .huffman_decode import huffman_decode
from .int8_linear import int8_linear, int8_linear_pack, quantize_rows

__all__ = ["huffman_decode", "int8_linear", "int8_linear_pack", "quantize_rows"]
