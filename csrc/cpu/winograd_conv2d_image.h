// What winograd_conv2d and winograd_conv2d_grad share: images as the kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../check.h"
#include "conv.h"
#include "cpu_features.h"
#include "elements.h"
#include "winograd_conv2d.h"
#include "winograd_conv2d_plan.h"

namespace compressops::cpu {

inline const WinogradConv2dKernels& winograd_conv2d_kernels() {
  const Features& cpu = features();
#if defined(__x86_64__)
  if (cpu.avx512) return winograd_conv2d_avx512();
  if (cpu.avx2) return winograd_conv2d_avx2();
#endif
  return winograd_conv2d_baseline();
}

struct Image {
  char* data;
  Element element;
  int64_t element_bytes;
  int64_t image_stride;
  ImageStrides strides;

  char* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return data +
           (n * image_stride + c * strides.c + h * strides.h + w * strides.w) * element_bytes;
  }
  // Whether a vector of 16 channels lies in memory as the transforms want it.
  bool direct(int64_t channels) const {
    return element == Element::kFloat && strides.c == 1 && channels == kBlock;
  }
};

inline Image image_of(const Tensor& tensor, const void* data, Element element) {
  return {static_cast<char*>(const_cast<void*>(data)),
          element,
          element_bytes(element),
          tensor.stride(0),
          {tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

// A window of up to 16 channels of an image, zeros where that ends.
struct Window {
  const float* data;
  int64_t row_stride, column_stride;
};

// The window of `rows` × `columns` pixels from (h, w) on, of the image of height × width: in place
// where the image lies in memory as the transforms read it, else copied into `buffer`.
inline Window window_of(const WinogradConv2dKernels& isa, const Image& image, int64_t n, int64_t c,
                        int64_t channels, int64_t h, int64_t w, int64_t rows, int64_t columns,
                        int64_t height, int64_t width, float* buffer) {
  const int64_t h0 = std::clamp<int64_t>(h, 0, height), h1 = std::clamp(h + rows, h0, height);
  const int64_t w0 = std::clamp<int64_t>(w, 0, width), w1 = std::clamp(w + columns, w0, width);
  const bool inside = h1 - h0 == rows && w1 - w0 == columns;
  const char* from = image.at(n, c, h0, w0);
  if (inside && image.direct(channels))
    return {reinterpret_cast<const float*>(from), image.strides.h, image.strides.w};
  const int64_t row_stride = columns * kBlock;
  if (!inside) std::memset(buffer, 0, rows * row_stride * sizeof(float));
  if (h1 > h0 && w1 > w0)
    isa.gather(from, image.element, image.strides, channels, h1 - h0, w1 - w0,
               buffer + (h0 - h) * row_stride + (w0 - w) * kBlock, row_stride);
  return {buffer, row_stride, kBlock};
}

}  // namespace compressops::cpu
