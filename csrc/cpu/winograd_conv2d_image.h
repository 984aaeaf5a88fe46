// What winograd_conv2d and winograd_conv2d_grad share: images as the kernels see them, memory,
// threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "../check.h"
#include "cpu_features.h"
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

inline Element element_of(const char* op, const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      fail_argument(op, argument, "of dtype float32, float16 or bfloat16", tensor);
  }
}

// Memory that a thread keeps from call to call, until it ends: fresh pages for some MB would cost
// as much as a small convolution. Plans keep it to some 16 MB, except for very many channels.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  float* get(int64_t floats) {
    if (floats > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      memory_ = static_cast<float*>(std::aligned_alloc(64, round_up(floats, kBlock) * 4));
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = floats;
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t capacity_ = 0;
};

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
          element == Element::kFloat ? 4 : 2,
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

// Calls f(i) for i < count. Threads fetch the next i when they have done one: where another process
// holds up one of them, the others go on.
template <typename F>
void for_each(int64_t count, F&& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  });
}

}  // namespace compressops::cpu
