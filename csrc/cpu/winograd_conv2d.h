// The inner kernels of winograd_conv2d, one implementation per instruction set. Like
// int8_linear.h, this header defines no function: translation units for different instruction sets
// include it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "element.h"

namespace compressops::cpu {

// Channels are handled in blocks of 16 floats, one cache line: input channels by the transform of
// the input, output channels by the transform of the products.
constexpr int64_t kBlock = 16;
// Transformed weights: panels of 32 output channels (the last may have 16), in a panel
// [position][input channel][32].
constexpr int64_t kPanel = 32;
// Rows of the largest register block of `multiply`; callers split their tiles evenly into blocks
// of no more than that.
constexpr int kMaxTileRows = 12;

// Element strides of a [C, H, W] image, or of a part of one.
struct ImageStrides {
  ptrdiff_t c, h, w;
};

// A transform is named by alpha = tile + r - 1 (4, 6 or 8) and, on the way out, the tile. On the
// way in it reads alpha_h × alpha pixels a tile, with alpha_h = alpha or, in one dimension, 1.
struct WinogradConv2dKernels {
  const char* isa;

  // Copies a window of `channels` <= 16 channels of an image into [rows][columns][16] floats.
  void (*gather)(const void* image, Element element, ImageStrides strides, int64_t channels,
                 int64_t rows, int64_t columns, float* window, int64_t window_row);
  // The reverse, rounded to the element type.
  void (*scatter)(const float* window, int64_t window_row, int64_t channels, int64_t rows,
                  int64_t columns, Element element, ImageStrides strides, void* image);

  // V = Bᵀ d B for `tiles` tiles side by side, `step` pixels apart, of 16 channels. d is at
  // window[row * row_stride + column * column_stride]; v[position * position_stride + tile *
  // tile_stride] gets its 16 channels.
  void (*transform_input)(int alpha, bool one_dimensional, const float* window, int64_t row_stride,
                          int64_t column_stride, int64_t step, int64_t tiles, float* v,
                          int64_t position_stride, int64_t tile_stride);
  // Y = Aᵀ m A, plus bias[16], at least 0 where `relu`, the same way round.
  void (*transform_output)(int alpha, int tile, bool one_dimensional, const float* m,
                           int64_t position_stride, int64_t tile_stride, int64_t tiles,
                           const float* bias, bool relu, float* window, int64_t row_stride,
                           int64_t column_stride);

  // A y Aᵀ, the transpose of transform_output: of tile_h × tile pixels a tile, the same way round
  // as transform_input.
  void (*transform_gradient)(int alpha, int tile, bool one_dimensional, const float* window,
                             int64_t row_stride, int64_t column_stride, int64_t tiles, float* m,
                             int64_t position_stride, int64_t tile_stride);

  // m[t][0..width) = sum over c < depth of v[t][c] * u[c][0..width) for `tiles` rows, in register
  // blocks of whole rows; width is 32 or 16, and the row stride of u.
  void (*multiply)(const float* v, int64_t v_stride, const float* u, int64_t width, int64_t depth,
                   int64_t tiles, float* m, int64_t m_stride);
  // u[k][0..width) += sum over t < tiles of m[t][k] * v[t][0..width) for k < rows; width is a
  // multiple of 16.
  void (*multiply_transposed)(const float* m, int64_t m_stride, const float* v, int64_t v_stride,
                              int64_t tiles, int64_t rows, int64_t width, float* u,
                              int64_t u_stride);
};

const WinogradConv2dKernels& winograd_conv2d_baseline();
const WinogradConv2dKernels& winograd_conv2d_avx2();
const WinogradConv2dKernels& winograd_conv2d_avx512();

}  // namespace compressops::cpu
