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
constexpr int kPackedRows = 6;        // rows of the largest register block of `multiply`
constexpr int kPackedDirectRows = 8;  // the most rows that `multiply_packed` takes

// The scale groups of a panel, one after the other:
//   y[row][n] += scales[n] * (sum over k of q[row][k] * code[k][n] + shift[row] * zero[n])
// with zero[n] = zeros[n] or, where zeros is null, 1. y is [rows][width].
struct PackedGroups {
  const float* scales;   // [groups][width]
  const uint8_t* zeros;  // [groups][width] or null
  // [rows][shifts_stride], one a group: minus the sum of the row's codes, times the code of 0.0
  // where zeros is null.
  const int32_t* shifts;
  int64_t shifts_stride;
};

struct PackedProducts {
  const char* isa;

  // sums[g] = the sum of q[g * group .. (g + 1) * group), for all of `depth`.
  void (*sum_groups)(const int8_t* q, int64_t depth, int64_t group, int32_t* sums);
  // `words` packed words of a panel to bytes; depth / (32 / bits) * width of them.
  void (*unpack)(int bits, const uint8_t* packed, int width, int64_t blocks, uint8_t* panel);
  // `depth` inputs in groups of `group` (the last may be shorter), unpacked; at most kPackedRows
  // rows.
  void (*multiply)(const int8_t* q, int64_t q_stride, const uint8_t* panel, int width,
                   int64_t depth, int64_t group, int rows, const PackedGroups& groups, float* y);
  // The same of packed words, at most kPackedDirectRows rows.
  void (*multiply_packed)(int bits, const int8_t* q, int64_t q_stride, const uint8_t* packed,
                          int width, int64_t depth, int64_t group, int rows,
                          const PackedGroups& groups, float* y);
};

const PackedProducts& packed_products_baseline();
const PackedProducts& packed_products_avx2();
const PackedProducts& packed_products_avx512();

}  // namespace compressops::cpu
