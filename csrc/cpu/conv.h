// What the convolutions share: memory formats, memory that is kept, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "../check.h"

namespace compressops::cpu {

// Channels last in memory, and not contiguous too.
inline bool is_channels_last(const Tensor& x) {
  if (x.numel() == 0) return false;  // contiguous, whatever its strides
  int64_t expected = 1;
  bool last = true, contiguous = true;
  for (int dim : {1, 3, 2, 0}) {
    last = last && (x.size(dim) == 1 || x.stride(dim) == expected);
    expected *= x.size(dim);
  }
  expected = 1;
  for (int dim : {3, 2, 1, 0}) {
    contiguous = contiguous && (x.size(dim) == 1 || x.stride(dim) == expected);
    expected *= x.size(dim);
  }
  return last && !contiguous;
}

// [N, C, H, W] of x's dtype, in memory [N][H][W][C] or [N][C][H][W].
inline Tensor new_image(const Tensor& x, int64_t N, int64_t C, int64_t H, int64_t W,
                        bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(x, {N, C, H, W});
  const Tensor out = torch::stable::new_empty(x, {N, H, W, C});
  return torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
}

// Memory that a thread keeps from call to call, until it ends: fresh pages for some MB would cost
// as much as a small convolution.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <typename T = float>
  T* get(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (bytes > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  int64_t capacity_ = 0;
};

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
