// The inner kernels of bsr_linear, its gradients, bsr_conv2d and bsr_int8_linear, one
// implementation per instruction set. Like int8_linear.h, this header defines no function:
// translation units for different instruction sets include it.
#pragma once

#include <stdint.h>

#include "element.h"
#include "gelu.h"
#include "quantize_row.h"

namespace compressops::cpu {

// Outputs side by side in a strip of the weight, one cache line of floats.
constexpr int kStrip = 16;
// Pixels of an image that lie side by side.
constexpr int kHalf = kStrip / 2;

// Items are 4 bytes: a float, or 4 int8 of neighbouring inputs.
//
// A strip of the weight is r outputs of some blocks, [blocks][depth][r]: r values of one input (or
// of 4) side by side. A panel of activations is `width` rows of x, [K][width]: one input of all
// rows side by side. Each block meets the panel's rows columns[block] · depth + (0 … depth - 1).
struct BsrStrip {
  const void* values;
  const int32_t* columns;
  int64_t blocks;
  int64_t depth;
  int r;
};

// The last steps for rows × `columns` outputs: y[m][n] = activation(sums[m][n] + bias[n]).
struct BsrFinish {
  int64_t rows, columns;
  const float* bias;  // or null
  bool relu;
  Gelu gelu;        // or null
  Element element;  // of y
  void* y;
  int64_t y_stride;
};

// What sums of products of integers are worth: (sums[m][n] - zero[m] · weight_sums[n]) · scale[m] ·
// scales[n].
struct BsrScales {
  const RowScale* rows;
  const float* scales;
  const int32_t* weight_sums;
};

struct BsrLinearKernels {
  const char* isa;
  // Panels are as wide as `multiply` has a kernel for: 1 … 8 and even widths up to `most_rows`.
  int most_rows;

  // panel[k][m] = x[m][k] for k < count, as floats, in rows of panel_stride; 0 for m from `rows` to
  // `width`.
  void (*pack)(const void* x, Element element, int64_t x_stride, int64_t rows, int64_t count,
               float* panel, int64_t width, int64_t panel_stride);
  // to[row][column] = from[row][column * step] as floats, in rows of to_stride.
  void (*copy)(const void* from, Element element, int64_t stride, int64_t step, int64_t rows,
               int64_t columns, float* to, int64_t to_stride);

  // sums[m][16], the products of a strip of 16 with a panel.
  void (*multiply)(const BsrStrip& strip, Element element, const float* panel, int width,
                   float* sums);
  // sums[strip][16] of one row and `count` strips of 16.
  void (*multiply_row)(const BsrStrip* strips, int64_t count, Element element, const float* row,
                       float* sums);
  // sums[n][16] for the r outputs of a strip of fewer, with 16 rows of a panel as wide as that.
  void (*multiply_narrow)(const BsrStrip& strip, const float* panel, float* sums);

  // The same for 16 pixels of images, in two halves of 8 side by side, and sums that begin with
  // the r biases: input i of the strip is at pixels[half] + offsets[i]. Of floats alone.
  void (*multiply_pixels)(const float* weights, int r, const int64_t* offsets, int64_t inputs,
                          const float* const* pixels, const float* bias, float* sums);

  // sums[m][16] of integers to floats, in place; null of floats.
  void (*scale)(float* sums, int64_t rows, int64_t columns, const BsrScales& how);
  // sums[m][16] of floats to y, by way of sums. Of one row, columns may be those of many strips; so
  // they may of `scale`.
  void (*finish)(float* sums, const BsrFinish& how);
};

// Those of this machine, for floats.
const BsrLinearKernels& bsr_linear_kernels();

const BsrLinearKernels& bsr_linear_baseline();
const BsrLinearKernels& bsr_linear_avx2();
const BsrLinearKernels& bsr_linear_avx512();
const BsrLinearKernels& bsr_int8_linear_baseline();
const BsrLinearKernels& bsr_int8_linear_avx2();
const BsrLinearKernels& bsr_int8_linear_avx512();

}  // namespace compressops::cpu
