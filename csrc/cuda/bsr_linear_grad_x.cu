#include <array>

#include "bsr_op.h"
#include "bsr_transpose.cuh"

namespace compressops {
namespace {

constexpr const char* kOp = "bsr_linear_grad_x";

// The columns of the blocks, sorted, and the blocks' numbers in that order.
std::array<Tensor, 2> sorted(const Tensor& columns) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack = {from(columns), from(std::optional<bool>(true)),
                                       from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor bsr_linear_grad_x(const Tensor& grad, const Tensor& values, const Tensor& crow_indices,
                         const Tensor& col_indices, int64_t in_features) {
  COMPRESSOPS_CHECK(grad.is_cuda() && grad.dim() >= 1 && is_float_dtype(grad), kOp, "grad",
                    "a CUDA float32, float16 or bfloat16 tensor [..., N]", grad);
  const int64_t N = grad.size(grad.dim() - 1), K = in_features;
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const BsrBlocks blocks = checked_blocks(kOp, values, crow_indices, col_indices, N, K, grad,
                                          common_dtype(grad, values), true);
  const Tensor y = new_result(grad, K);
  if (y.numel() == 0) return y;
  const auto [columns, order] = sorted(blocks.col);
  const Tensor starts = torch::stable::new_empty(grad, {blocks.columns + 1}, ScalarType::Int);
  const Tensor block_rows = torch::stable::new_empty(grad, {blocks.nnz}, ScalarType::Int);
  check_cuda(launch_bsr_transpose(data_of<int>(blocks.crow), data_of<int>(columns),
                                  data_of<int64_t>(order), blocks.rows, blocks.columns, blocks.nnz,
                                  multiprocessor_count(grad, kOp), data_of<int>(starts),
                                  data_of<int>(block_rows), current_stream(grad, kOp)),
             kOp);
  with_common_type(grad, values, [&](const Tensor& common, auto element) {
    using T = decltype(element);
    BsrArgs<T> args{};
    args.M = y.numel() / K, args.N = K, args.K = N;
    const BsrRows rows = bsr_rows<T>(kOp, common, args.M, N);
    args.x = data_of<T>(rows.memory);
    args.x_row_stride = rows.stride, args.x_columns = rows.columns;
    args.order = data_of<int64_t>(order);
    multiply_blocks<true>(kOp, blocks, args, starts, block_rows, y);
  });
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("bsr_linear_grad_x", TORCH_BOX(&compressops::bsr_linear_grad_x));
}
