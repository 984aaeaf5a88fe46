// What int8_linear and int8_conv2d on CUDA tensors check alike. Host code only.
#pragma once

#include "quantize_rows.cuh"
#include "stable_cuda.h"

namespace compressops {

// Products whose sum fits 31 bits: |q| ≤ 127 times |weight| ≤ 128.
constexpr int64_t kInt8MaxTerms = 131072;
static_assert(kInt8MaxTerms * 127 * 128 <= 0x7fffffff);
// With zero points |q − zero| ≤ 255.
constexpr int64_t kInt8MaxAsymmetricTerms = 65536;
static_assert(kInt8MaxAsymmetricTerms * 255 * 128 <= 0x7fffffff);

// How x is to be quantized.
struct Int8Quantization {
  RowScaling scaling;
  OptionalTensor x_scale, x_zero;

  int64_t max_terms() const {
    return scaling == RowScaling::kSymmetric ? kInt8MaxTerms : kInt8MaxAsymmetricTerms;
  }
  // Memory for the zero points of so many rows, where there are any.
  OptionalTensor new_zeros(const Tensor& x, int64_t rows) const {
    if (scaling == RowScaling::kSymmetric) return std::nullopt;
    return torch::stable::new_empty(x, {rows}, ScalarType::Int);
  }
  RowZeros row_zeros(const OptionalTensor& zeros) const {
    return {data_of<float>(x_scale), data_of<int8_t>(x_zero),
            zeros ? data_of<int>(*zeros) : nullptr};
  }
};

inline Int8Quantization checked_quantization(const char* op, const Tensor& x,
                                             const OptionalTensor& x_scale,
                                             const OptionalTensor& x_zero, bool symmetric) {
  if (x_scale) check_operand(op, *x_scale, "x_scale", "float32", ScalarType::Float, {}, x);
  if (x_zero) check_operand(op, *x_zero, "x_zero", "int8", ScalarType::Char, {}, x);
  if (x_zero) COMPRESSOPS_CHECK(x_scale, op, "x_zero", "None without x_scale", *x_zero);
  COMPRESSOPS_CHECK(symmetric || !x_scale, op, "symmetric",
                    "True with x_scale (x_zero says it there)", int64_t{symmetric});
  return {x_scale     ? RowScaling::kStatic
          : symmetric ? RowScaling::kSymmetric
                      : RowScaling::kAsymmetric,
          x_scale, x_zero};
}

// x [..., K] whose rows are quantized, and a weight of N outputs.
struct Int8Rows {
  Int8Quantization how;
  int64_t K, N;
};

inline Int8Rows checked_rows(const char* op, const Tensor& x, const Tensor& weight_scales,
                             const Tensor& weight_sums, const OptionalTensor& x_scale,
                             const OptionalTensor& x_zero, bool symmetric) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() >= 1 && is_float_dtype(x), op, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [..., K]", x);
  const int64_t K = x.size(x.dim() - 1);
  const Int8Quantization how = checked_quantization(op, x, x_scale, x_zero, symmetric);
  const int64_t most = how.max_terms();
  COMPRESSOPS_CHECK(K <= most, op, "x", "at most " + std::to_string(most) + " wide (int32 sums)",
                    x);
  COMPRESSOPS_CHECK(weight_scales.dim() == 1, op, "weight_scales", "of one dimension",
                    weight_scales);
  const int64_t N = weight_scales.size(0);
  check_operand(op, weight_scales, "weight_scales", "float32", ScalarType::Float, {N}, x);
  check_operand(op, weight_sums, "weight_sums", "int32", ScalarType::Int, {N}, x);
  return {how, K, N};
}

}  // namespace compressops
