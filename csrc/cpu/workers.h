// Memory that threads keep, and work that they share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace compressops::cpu {

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
