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

}  // namespace compressops
