// The inner kernels of int4_linear and ternary_linear, one implementation per instruction set. Like
// int8_linear.h, this header defines no function: translation units for different instruction sets
// include it.
//
// Weights are unsigned codes of 2 or 4 bits, activations int8: what vpdpbusd multiplies, with no
// correction but for the codes' zero points. A panel holds 32 output features (the last one of a
// weight may hold 16), `width`. Packed, it is [depth / (32 / bits)][width] words of 32 bits: byte i
// of a word has the codes of inputs i, 4 + i, 8 + i, .. of its block, the first in its lowest bits.
// Unpacked it is [depth / 4][width][4] bytes.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

constexpr int kPackedPanel = 32;
constexpr int kPackedRows = 12;       // rows of the largest register block of `multiply`
constexpr int kPackedDirectRows = 4;  // the most rows that `multiply_packed` takes

// One scale group of a panel, or (multiply_packed) all of them one after the other:
//   y[row][n] += scales[n] * (sum over k of q[row][k] * code[k][n] - zero[n] * x_sums[row])
// with zero[n] = zeros[n] or, where zeros is null, `zero`. y is [rows][width].
struct PackedGroups {
  const float* scales;   // [groups][width]
  const uint8_t* zeros;  // [groups][width] or null
  int zero;
  const int32_t* x_sums;  // [rows][x_sums_stride], a sum a group
  int64_t x_sums_stride;
};

struct PackedProducts {
  const char* isa;

  // sums[g] = the sum of q[g * group .. (g + 1) * group), for all of `depth`.
  void (*sum_groups)(const int8_t* q, int64_t depth, int64_t group, int32_t* sums);
  // `words` packed words of a panel to bytes; depth / (32 / bits) * width of them.
  void (*unpack)(int bits, const uint8_t* packed, int width, int64_t blocks, uint8_t* panel);
  // One group of `depth` unpacked inputs, at most kPackedRows rows.
  void (*multiply)(const int8_t* q, int64_t q_stride, const uint8_t* panel, int width,
                   int64_t depth, int rows, const PackedGroups& group, float* y);
  // All groups of `group` inputs (the last may be shorter), at most kPackedDirectRows rows.
  void (*multiply_packed)(int bits, const int8_t* q, int64_t q_stride, const uint8_t* packed,
                          int width, int64_t depth, int64_t group, int rows,
                          const PackedGroups& groups, float* y);
};

const PackedProducts& packed_products_baseline();
const PackedProducts& packed_products_avx2();
const PackedProducts& packed_products_avx512();

}  // namespace compressops::cpu
