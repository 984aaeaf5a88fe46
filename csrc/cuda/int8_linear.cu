#include <optional>
#include <string>
#include <vector>

#include "int8_linear.cuh"
#include "stable_cuda.h"

namespace compressops {
namespace {

constexpr const char* kOp = "int8_linear";

// A row-major [N] or [N, K] of x's device.
void check_operand(const Tensor& tensor, const char* argument, const char* dtype_name,
                   ScalarType dtype, const std::vector<int64_t>& shape, const Tensor& x) {
  bool fits = same_device(tensor, x) && tensor.scalar_type() == dtype &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  std::string shape_text;
  for (size_t i = 0; i < shape.size(); ++i) {
    fits = fits && tensor.size(static_cast<int64_t>(i)) == shape[i];
    shape_text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  COMPRESSOPS_CHECK(fits, kOp, argument,
                    std::string("a ") + dtype_name + " tensor [" + shape_text + "] on x's device",
                    tensor);
}

template <class T>
void run(const Tensor& x, int64_t x_row_stride, const Tensor& weight, const Tensor& weight_scales,
         const Tensor& weight_sums, const std::optional<Tensor>& bias, Activation activation,
         RowScaling scaling, const std::optional<Tensor>& x_scale,
         const std::optional<Tensor>& x_zero, int64_t M, const Tensor& y) {
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor q = torch::stable::new_empty(x, {M * padded_to_16(K)}, ScalarType::Char);
  const Tensor x_scales = torch::stable::new_empty(x, {M}, ScalarType::Float);
  std::optional<Tensor> x_zeros;
  if (scaling != RowScaling::kSymmetric) {
    x_zeros = torch::stable::new_empty(x, {M}, ScalarType::Int);
  }
  const Int8LinearArgs<T> args = {
      M,
      N,
      K,
      static_cast<const T*>(x.const_data_ptr()),
      x_row_stride,
      static_cast<const int8_t*>(weight.const_data_ptr()),
      static_cast<const float*>(weight_scales.const_data_ptr()),
      static_cast<const int*>(weight_sums.const_data_ptr()),
      bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      activation,
      static_cast<int8_t*>(q.mutable_data_ptr()),
      static_cast<float*>(x_scales.mutable_data_ptr()),
      scaling,
      {x_scale ? static_cast<const float*>(x_scale->const_data_ptr()) : nullptr,
       x_zero ? static_cast<const int8_t*>(x_zero->const_data_ptr()) : nullptr,
       x_zeros ? static_cast<int*>(x_zeros->mutable_data_ptr()) : nullptr},
      static_cast<T*>(y.mutable_data_ptr())};
  check_cuda(launch_int8_linear(args, multiprocessor_count(x, kOp), current_stream(x, kOp)), kOp);
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scales,
                   const Tensor& weight_sums, const std::optional<Tensor>& bias,
                   const std::string& activation_name, const std::optional<Tensor>& x_scale,
                   const std::optional<Tensor>& x_zero, bool symmetric) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() >= 1 && is_float_dtype(x), kOp, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [..., K]", x);
  const int64_t K = x.size(x.dim() - 1);
  const RowScaling scaling = x_scale     ? RowScaling::kStatic
                             : symmetric ? RowScaling::kSymmetric
                                         : RowScaling::kAsymmetric;
  const int64_t most =
      scaling == RowScaling::kSymmetric ? kInt8LinearMaxK : kInt8LinearMaxAsymmetricK;
  COMPRESSOPS_CHECK(K <= most, kOp, "x", "at most " + std::to_string(most) + " wide (int32 sums)",
                    x);
  COMPRESSOPS_CHECK(weight_scales.dim() == 1, kOp, "weight_scales", "of one dimension",
                    weight_scales);
  const int64_t N = weight_scales.size(0);
  check_operand(weight_scales, "weight_scales", "float32", ScalarType::Float, {N}, x);
  check_operand(weight, "weight", "int8", ScalarType::Char, {N, K}, x);
  check_operand(weight_sums, "weight_sums", "int32", ScalarType::Int, {N}, x);
  std::optional<Tensor> float_bias;
  if (bias) {
    COMPRESSOPS_CHECK(
        same_device(*bias, x) && bias->dim() == 1 && bias->size(0) == N && is_float_dtype(*bias),
        kOp, "bias", "a float tensor [" + std::to_string(N) + "] on x's device", *bias);
    float_bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  }
  const Activation activation = parse_activation(activation_name, kOp);
  if (x_scale) check_operand(*x_scale, "x_scale", "float32", ScalarType::Float, {}, x);
  if (x_zero) check_operand(*x_zero, "x_zero", "int8", ScalarType::Char, {}, x);
  if (x_zero) COMPRESSOPS_CHECK(x_scale, kOp, "x_zero", "None without x_scale", *x_zero);
  COMPRESSOPS_CHECK(symmetric || !x_scale, kOp, "symmetric",
                    "True with x_scale (x_zero says it there)", int64_t{symmetric});

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
  const auto run_as = [&](auto value) {
    run<decltype(value)>(rows, x_row_stride, dense_weight, dense_scales, dense_sums, float_bias,
                         activation, scaling, x_scale, x_zero, M, y);
  };
  switch (x.scalar_type()) {
    case ScalarType::Half:
      run_as(__half{});
      break;
    case ScalarType::BFloat16:
      run_as(__nv_bfloat16{});
      break;
    default:
      run_as(float{});
  }
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("int8_linear", TORCH_BOX(&compressops::int8_linear));
}
