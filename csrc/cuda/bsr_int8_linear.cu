#include "bsr_op.h"
#include "int8_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "bsr_int8_linear";

Tensor bsr_int8_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices,
                       const Tensor& col_indices, const Tensor& weight_scales,
                       const Tensor& weight_sums, const OptionalTensor& bias,
                       const std::string& activation_name, const OptionalTensor& x_scale,
                       const OptionalTensor& x_zero, bool symmetric,
                       const OptionalTensor& row_order) {
  const auto [how, K, N] =
      checked_rows(kOp, x, weight_scales, weight_sums, x_scale, x_zero, symmetric);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const BsrBlocks blocks = checked_blocks(kOp, values, crow_indices, col_indices, N, K, x,
                                          ScalarType::Char, false, row_order);
  const OptionalTensor float_bias = checked_bias(kOp, bias, N, x);
  const Activation activation = parse_activation(activation_name, kOp);
  const Tensor y = new_result(x, N);
  if (y.numel() == 0) return y;

  const int64_t M = y.numel() / N, columns = padded_to_16(K);
  const bool dense_rows = x.dim() == 2 && (K <= 1 || x.stride(1) == 1) && x.stride(0) >= K;
  const Tensor rows = dense_rows ? x : torch::stable::contiguous(x);
  const Tensor q = torch::stable::new_empty(x, {M * columns}, ScalarType::Char);
  const Tensor x_scales = torch::stable::new_empty(x, {M}, ScalarType::Float);
  const OptionalTensor x_zeros = how.new_zeros(x, M);
  const RowZeros zeros = how.row_zeros(x_zeros);
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    check_cuda(launch_quantize_rows<T>(how.scaling, static_cast<const T*>(rows.const_data_ptr()),
                                       dense_rows ? x.stride(0) : K, M, K, data_of<int8_t>(q),
                                       data_of<float>(x_scales), current_stream(x, kOp), zeros),
               kOp);
  });
  const Tensor dense_scales = torch::stable::contiguous(weight_scales);
  const Tensor dense_sums = torch::stable::contiguous(weight_sums);
  BsrArgs<int8_t> args{};
  args.M = M, args.N = N, args.K = K;
  args.x = data_of<int8_t>(q);
  args.x_row_stride = args.x_columns = columns;
  args.bias = data_of<float>(float_bias);
  args.activation = activation;
  args.x_scales = data_of<float>(x_scales);
  args.x_zeros = zeros.zeros;
  args.scales = data_of<float>(dense_scales);
  args.weight_sums = data_of<int>(dense_sums);
  multiply_blocks<false>(kOp, blocks, args, blocks.crow, blocks.col, y);
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("bsr_int8_linear", TORCH_BOX(&compressops::bsr_int8_linear));
}
