// What the convolutions share: memory formats.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"
#include "workers.h"

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

}  // namespace compressops::cpu
