// The inner kernels of int8_linear, one implementation per instruction set. This header is included
// by translation units that are compiled for different ones, so it defines no function and includes
// nothing that would: a linker may keep the wrong copy of an inline function.
#pragma once

#include <stdint.h>

#include "quantize_row.h"

namespace compressops::cpu {

// Packed weights: [ceil(N / 16)][ceil(K / 4)][16][4] int8, the operand order of vpdpbusd.
constexpr int64_t kColumns = 16;
constexpr int64_t kDepth = 4;

// y[m][n] = (sum over k of (q[m][k] - zero[m]) * weight[n][k]) * (scale[m] * scales[n]) + bias[n]
struct Int8Block {
  const uint8_t* q;  // [rows][k_blocks * 4]
  int64_t q_stride;
  const RowScale* rows;
  bool one_zero;  // all rows have the first one's
  int count;      // of rows, at most those of a tile that has so many panels

  const int8_t* panels;  // [panel_count][k_blocks][16][4]
  int panel_count;
  int64_t k_blocks;
  int64_t columns;  // of them that there are, the last panel may have less than 16
  const int32_t* weight_sums;
  const float* scales;
  const float* bias;  // or null

  bool relu;
  float* y;
  int64_t y_stride;
};

struct Int8LinearKernels {
  const char* isa;
  void (*multiply)(const Int8Block& block);
};

// Blocks of rows and panels that are multiplied at once.
struct Int8Tile {
  int rows, panels;
};
constexpr Int8Tile kTile = {6, 4};
// For 7 and 8 rows, whose weights are then read once.
constexpr Int8Tile kTallTile = {8, 3};

const Int8LinearKernels& int8_linear_baseline();
const Int8LinearKernels& int8_linear_avx2();
const Int8LinearKernels& int8_linear_avx512();

}  // namespace compressops::cpu
