// The inner kernels of int8_conv2d, one implementation per instruction set. This header is included
// by translation units that are compiled for different ones, so it defines no function and includes
// nothing that would: a linker may keep the wrong copy of an inline function.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

// Packed weights: [groups][ceil(K / 16)][R][S][ceil(C / 4)][16][4] int8 with K and C of one group,
// the operand order of vpdpbusd; where every group has one input and one output channel,
// [ceil(K / 16)][R][S][16].
constexpr int64_t kConvColumns = 16;
constexpr int64_t kConvDepth = 4;

// The register block of `multiply`: pixels, and panels of 16 output channels.
constexpr int kConvRows = 6;
constexpr int kConvPanels = 4;

// Input that lies side by side: `blocks` times 4 channels, `offset` bytes after the first of a
// pixel's window.
struct ConvRun {
  int64_t offset, blocks;
};

// The bits, as integers, of the largest of x and 0 and of the largest of -x and 0. NaN and Inf are
// above all numbers.
struct ConvRange {
  int32_t high, low;
};

// code = clamp(rint(x * inverse) + offset, low, 255), where NaN counts as 0.
struct ConvQuantization {
  float inverse;
  int offset, low;
};

// y = max((sum - offset * weight_sum) * (x_scale * scale) + bias, relu ? 0 : -Inf)
struct ConvOutput {
  float x_scale;
  int offset;
  const float* scales;
  const int32_t* sums;
  const float* bias;  // may be null
  bool relu;
};

struct Int8Conv2dKernels {
  const char* isa;

  // Widens `range` by x.
  void (*range)(const float* x, int64_t count, ConvRange* range);

  // The pixels x[c * plane + p] to codes[p * pixel_bytes + c]. Writes channels rounded up to a
  // multiple of 4 a pixel; what it writes behind the channels means nothing. Those of the
  // instruction sets need an `inverse` that is finite, as the baseline does not.
  void (*quantize_planes)(const float* x, int64_t plane, int64_t channels, int64_t pixels,
                          ConvQuantization quantization, uint8_t* codes, int64_t pixel_bytes);
  // The same of x[p * pixel + c].
  void (*quantize_pixels)(const float* x, int64_t pixel, int64_t channels, int64_t pixels,
                          ConvQuantization quantization, uint8_t* codes, int64_t pixel_bytes);

  // sums[m][n] = sum over the runs, in the order of the weights, of codes times weights, for `rows`
  // (<= kConvRows) pixels, whose windows begin at pixels[m], and `panels` (<= kConvPanels) times 16
  // output channels.
  void (*multiply)(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
                   const int8_t* weight, int64_t panel_bytes, int rows, int panels, int32_t* sums,
                   int64_t sums_stride);
  // The same for 16 channels that are groups of their own; a run is one position of the kernel.
  void (*multiply_depthwise)(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
                             const int8_t* weight, int rows, int32_t* sums, int64_t sums_stride);

  // out[m * pixel_stride + n * channel_stride] for `pixels` rows of `columns` sums; one of the
  // strides is 1.
  void (*finish)(const int32_t* sums, int64_t sums_stride, int64_t pixels, int64_t columns,
                 const ConvOutput& output, float* out, int64_t pixel_stride,
                 int64_t channel_stride);
};

const Int8Conv2dKernels& int8_conv2d_baseline();
const Int8Conv2dKernels& int8_conv2d_avx2();
const Int8Conv2dKernels& int8_conv2d_avx512();

}  // namespace compressops::cpu
