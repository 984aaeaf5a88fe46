// The inner kernels of int8_linear, one implementation per instruction set. This header is included
// by translation units that are compiled for different ones, so it defines no function and includes
// nothing that would: a linker may keep the wrong copy of an inline function.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

// Packed weights: [ceil(N / 16)][ceil(K / 4)][16][4] int8, the operand order of vpdpbusd.
constexpr int64_t kColumns = 16;
constexpr int64_t kDepth = 4;

struct Int8Row {
  float x_scale;
  int32_t x_zero;  // the code that 0.0 has in q
};

struct Int8LinearKernels {
  const char* isa;
  // accumulators[m][n] = sum over k of q[m][k] * weight[n][k] for `rows` rows (<= kMaxRows) and one
  // panel group of `panels` (<= kMaxPanels) times 16 columns. q is [rows][k_blocks * 4] with stride
  // q_stride, accumulators is [rows][panels * 16].
  void (*multiply)(const uint8_t* q, int64_t q_stride, const int8_t* panels_start, int64_t k_blocks,
                   int rows, int panels, int32_t* accumulators);
  // y[n] = (sums[n] - x_zero * weight_sums[n]) * (x_scale * scales[n]) + bias[n] of one row; bias
  // may be null.
  void (*finish)(const int32_t* sums, int64_t columns, const Int8Row& row,
                 const int32_t* weight_sums, const float* scales, const float* bias, bool relu,
                 float* y);
};

constexpr int kMaxRows = 6;
constexpr int kMaxPanels = 4;

const Int8LinearKernels& int8_linear_baseline();
const Int8LinearKernels& int8_linear_avx2();
const Int8LinearKernels& int8_linear_avx512();

}  // namespace compressops::cpu
