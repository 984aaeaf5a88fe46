// What the convolutions share: sizes and memory formats.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "../check.h"
#include "workers.h"

namespace compressops::cpu {

struct ConvSizes {
  int64_t N, C, H, W, K, R, S;
  std::vector<int64_t> stride, padding, dilation;

  // How far a kernel reaches.
  int64_t reach_h() const { return (R - 1) * dilation[0] + 1; }
  int64_t reach_w() const { return (S - 1) * dilation[1] + 1; }
  int64_t out_h() const { return out_size(H + 2 * padding[0] - reach_h(), stride[0]); }
  int64_t out_w() const { return out_size(W + 2 * padding[1] - reach_w(), stride[1]); }

 private:
  static int64_t out_size(int64_t room, int64_t step) { return room < 0 ? 0 : room / step + 1; }
};

inline void check_image(const char* op, const Tensor& x) {
  COMPRESSOPS_CHECK(
      x.is_cpu() && x.dim() == 4 && x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, op, "x",
      "a CPU tensor [N, C, H, W], empty in N alone", x);
}

inline void check_steps(const char* op, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
}

inline void check_reach(const char* op, const ConvSizes& sizes, const Tensor& x) {
  COMPRESSOPS_CHECK(sizes.out_h() >= 1 && sizes.out_w() >= 1, op, "x",
                    "at least as large as the kernel, padding included", x);
}

// x as [N][H][W][C] or [N][C][H][W], copied only where it is neither.
inline Tensor dense_image(const Tensor& x, bool channels_last) {
  if (!channels_last) return as_contiguous(x);
  return as_contiguous(torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3));
}

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

}  // namespace compressops::cpu
