#include <optional>
#include <vector>

#include "round_rows.cuh"
#include "stable_cuda.h"

namespace compressops {
namespace {

constexpr const char* kOp = "round_rows";

// The dimensions before the last, those that follow each other without a gap as one; nothing where
// more than three are left, or elements of a row stand apart.
std::optional<StridedRows> rows_in_place(const Tensor& x) {
  StridedRows rows = {{1, 1, 1}, {0, 0, 0}};
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return std::nullopt;
  int at = 3;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (at < 3 && x.stride(d) == rows.strides[at] * rows.sizes[at]) {
      rows.sizes[at] *= x.size(d);
      continue;
    }
    if (at == 0) return std::nullopt;
    --at;
    rows.sizes[at] = x.size(d);
    rows.strides[at] = x.stride(d);
  }
  return rows;
}

Tensor round_rows_cuda(const Tensor& x, bool symmetric) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() >= 1 && is_float_dtype(x), kOp, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [..., K]", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  const Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const int64_t K = sizes.back();
  const std::optional<StridedRows> in_place = rows_in_place(x);
  const Tensor from = in_place ? x : torch::stable::contiguous(x);
  const StridedRows rows = in_place ? *in_place : StridedRows{{1, 1, y.numel() / K}, {0, 0, K}};
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    const RoundRowsArgs<T> args = {rows, K, data_of<T>(from), data_of<T>(y)};
    const auto launch_it = symmetric ? launch_round_rows<T, RowScaling::kSymmetric>
                                     : launch_round_rows<T, RowScaling::kAsymmetric>;
    check_cuda(launch_it(args, current_stream(x, kOp), 0x7fffffff), kOp);
  });
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("round_rows", TORCH_BOX(&compressops::round_rows_cuda));
}
