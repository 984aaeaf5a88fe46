#include "bsr_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "bsr_linear";

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices,
                  const Tensor& col_indices, int64_t out_features, const OptionalTensor& bias,
                  const std::string& activation_name, const OptionalTensor& row_order) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() >= 1 && is_float_dtype(x), kOp, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [..., K]", x);
  const int64_t N = out_features, K = x.size(x.dim() - 1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const BsrBlocks blocks = checked_blocks(kOp, values, crow_indices, col_indices, N, K, x,
                                          common_dtype(x, values), false, row_order);
  const OptionalTensor float_bias = checked_bias(kOp, bias, N, x);
  const Activation activation = parse_activation(activation_name, kOp);
  const Tensor y = new_result(x, N);
  if (y.numel() == 0) return y;
  with_common_type(x, values, [&](const Tensor& common, auto element) {
    using T = decltype(element);
    BsrArgs<T> args{};
    args.M = y.numel() / N, args.N = N, args.K = K;
    const BsrRows rows = bsr_rows<T>(kOp, common, args.M, K);
    args.x = data_of<T>(rows.memory);
    args.x_row_stride = rows.stride, args.x_columns = rows.columns;
    args.bias = data_of<float>(float_bias);
    args.activation = activation;
    multiply_blocks<false>(kOp, blocks, args, blocks.crow, blocks.col, y);
  });
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("bsr_linear", TORCH_BOX(&compressops::bsr_linear));
}
