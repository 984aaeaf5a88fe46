// Rows of activations to 8 bits, for the products of integers. This header is included by
// translation units that are compiled for different instruction sets, so it defines no function and
// includes nothing that would: a linker may keep the wrong copy of an inline function.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

// How: each row by its own largest magnitude, by its own range, or all by the same scale.
struct Quantization {
  enum Kind { kSymmetric, kAsymmetric, kStatic } kind = kSymmetric;
  int offset = 0;                   // added to each code, modulo 256: 0 for int8, 128 for uint8
  float scale = 1.0f;               // where it is static
  int zero = 0;                     // where it is static: the int8 code of 0.0
  float largest = 3.402823466e38f;  // of rounded values, which may lie past the range's end
};

// A row's x[k] is about scale * (q[k] - zero), of codes with their offset. NaN where x holds NaN or
// Inf.
struct RowScale {
  float scale;
  int zero;
};

// x [K] to codes q [K], and codes of 0.0 up to `padded`.
using QuantizeRow = RowScale (*)(const float* x, uint8_t* q, int64_t K, int64_t padded,
                                 const Quantization& how);

// x [K] to the values y [K] that its codes stand for.
using RoundRow = void (*)(const float* x, float* y, int64_t K, const Quantization& how);

// Those that suit the processor.
QuantizeRow quantize_row();
RoundRow round_row();

// What it is made of, the kernels with one implementation per instruction set.
struct RowRange {
  uint32_t top;     // the largest bit pattern of |x|: NaN and Inf are above all numbers
  float low, high;  // of x and 0, where asked for
};
struct RowCodes {
  float inverse;      // of the scale
  float least, most;  // x * inverse is clipped to them
  int zero;           // added then
  bool finite;        // else all x count as 0
};
// How values of a range are quantized, and their scale (NaN where they are not all finite).
RowCodes row_codes(const RowRange& range, const Quantization& how, float* scale);
struct QuantizeRowKernels {
  RowRange (*range)(const float* x, int64_t K, bool low_and_high);
  // q[k] = rint(clip(x[k] * inverse)) + zero, with NaN of 0 * Inf as 0; `zero` up to `padded`.
  void (*codes)(const float* x, uint8_t* q, int64_t K, int64_t padded, const RowCodes& how);
  // y[k] = rint(clip(x[k] * inverse)) * scale within ±largest, with NaN of 0 * Inf as 0, and no
  // zero negative. x may be y.
  void (*values)(const float* x, float* y, int64_t K, const RowCodes& how, float scale,
                 float largest);
};
const QuantizeRowKernels& quantize_row_baseline();
const QuantizeRowKernels& quantize_row_avx2();
const QuantizeRowKernels& quantize_row_avx512();

}  // namespace compressops::cpu
