#include <string>
#include <vector>

#include "int8_linear_launch.cuh"
#include "int8_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "int8_linear";

template <class T>
void run(const Tensor& x, int64_t x_row_stride, const Tensor& weight, const Tensor& weight_scales,
         const Tensor& weight_sums, const OptionalTensor& bias, Activation activation,
         const Int8Quantization& how, int64_t M, const Tensor& y) {
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor q = torch::stable::new_empty(x, {M * padded_to_16(K)}, ScalarType::Char);
  const Tensor x_scales = torch::stable::new_empty(x, {M}, ScalarType::Float);
  const OptionalTensor x_zeros = how.new_zeros(x, M);
  const Int8LinearArgs<T> args = {M,
                                  N,
                                  K,
                                  data_of<T>(x),
                                  x_row_stride,
                                  data_of<int8_t>(weight),
                                  data_of<float>(weight_scales),
                                  data_of<int>(weight_sums),
                                  data_of<float>(bias),
                                  activation,
                                  data_of<int8_t>(q),
                                  data_of<float>(x_scales),
                                  how.scaling,
                                  how.row_zeros(x_zeros),
                                  data_of<T>(y)};
  check_cuda(launch_int8_linear(args, multiprocessor_count(x, kOp), compute_capability(x, kOp),
                                current_stream(x, kOp)),
             kOp);
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scales,
                   const Tensor& weight_sums, const OptionalTensor& bias,
                   const std::string& activation_name, const OptionalTensor& x_scale,
                   const OptionalTensor& x_zero, bool symmetric) {
  const auto [how, K, N] =
      checked_rows(kOp, x, weight_scales, weight_sums, x_scale, x_zero, symmetric);
  check_operand(kOp, weight, "weight", "int8", ScalarType::Char, {N, K}, x);
  const OptionalTensor float_bias = checked_bias(kOp, bias, N, x);
  const Activation activation = parse_activation(activation_name, kOp);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  std::vector<int64_t> y_sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) y_sizes.push_back(x.size(i));
  y_sizes.push_back(N);
  const Tensor y = torch::stable::new_empty(x, y_sizes);  // refuses sizes whose product overflows
  const int64_t M = N == 0 ? 0 : y.numel() / N;
  if (M == 0 || N == 0) return y;

  // A matrix whose rows are dense is read where it is; all else is copied.
  const bool dense_rows = x.dim() == 2 && (K <= 1 || x.stride(1) == 1) && x.stride(0) >= K;
  const Tensor rows = dense_rows ? x : torch::stable::contiguous(x);
  const int64_t x_row_stride = dense_rows ? x.stride(0) : K;
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_scales = torch::stable::contiguous(weight_scales);
  const Tensor dense_sums = torch::stable::contiguous(weight_sums);
  with_element_type(x, [&](auto element) {
    run<decltype(element)>(rows, x_row_stride, dense_weight, dense_scales, dense_sums, float_bias,
                           activation, how, M, y);
  });
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("int8_linear", TORCH_BOX(&compressops::int8_linear));
}
