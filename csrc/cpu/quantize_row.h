// Rows of activations to 8 bits, for the products of integers. This header is included by
// translation units that are compiled for different instruction sets, so it defines no function and
// includes nothing that would: a linker may keep the wrong copy of an inline function.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

// q[k] = rint(x[k] * 127 / amax) + offset modulo 256 for k < K, and offset up to `padded`: an
// offset of 0 for int8, of 128 for uint8. Returns the row's scale amax / 127; NaN where x holds NaN
// or Inf.
using QuantizeRow = float (*)(const float* x, uint8_t* q, int64_t K, int64_t padded, int offset);

float quantize_row_baseline(const float* x, uint8_t* q, int64_t K, int64_t padded, int offset);
float quantize_row_avx2(const float* x, uint8_t* q, int64_t K, int64_t padded, int offset);
float quantize_row_avx512(const float* x, uint8_t* q, int64_t K, int64_t padded, int offset);

// The one of them that suits the processor.
QuantizeRow quantize_row();

}  // namespace compressops::cpu
