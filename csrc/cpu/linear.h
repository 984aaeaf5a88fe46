// What the linear ops share: activations, element types, the output, quantized rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "gelu.h"
#include "quantize_row.h"

namespace compressops::cpu {

enum class Activation { kNone, kRelu, kGelu };

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  COMPRESSOPS_CHECK(name == "gelu", op, "activation", "'none', 'relu' or 'gelu'", name);
  return Activation::kGelu;
}

// How x is quantized, to u8; checks the arguments that say so.
inline Quantization quantization_of(const char* op, const std::optional<Tensor>& x_scale,
                                    const std::optional<Tensor>& x_zero, bool symmetric) {
  Quantization how{symmetric ? Quantization::kSymmetric : Quantization::kAsymmetric, 128};
  COMPRESSOPS_CHECK(x_scale || !x_zero, op, "x_zero", "None without x_scale", *x_zero);
  if (x_scale) {
    COMPRESSOPS_CHECK(
        x_scale->is_cpu() && x_scale->dim() == 0 && x_scale->scalar_type() == ScalarType::Float, op,
        "x_scale", "a CPU float32 tensor [] or None", *x_scale);
    COMPRESSOPS_CHECK(symmetric, op, "symmetric", "True with x_scale (x_zero says it there)",
                      int64_t{symmetric});
    how.kind = Quantization::kStatic;
    how.scale = *static_cast<const float*>(x_scale->const_data_ptr());
    COMPRESSOPS_CHECK(how.scale > 0 && how.scale <= std::numeric_limits<float>::max(), op,
                      "x_scale", "positive and finite", std::to_string(how.scale));
    if (x_zero) {
      COMPRESSOPS_CHECK(
          x_zero->is_cpu() && x_zero->dim() == 0 && x_zero->scalar_type() == ScalarType::Char, op,
          "x_zero", "a CPU int8 tensor [] or None", *x_zero);
      how.zero = *static_cast<const int8_t*>(x_zero->const_data_ptr());
    }
  }
  return how;
}

// Products whose sum is exact in int32: |sum| <= 127 · 128 · terms, with zero points 255 · 128 ·
// terms.
constexpr int64_t kMaxTerms = 131072;
inline int64_t max_terms(const Quantization& how) {
  return how.kind == Quantization::kSymmetric ? kMaxTerms : kMaxTerms / 2;
}

// Calls f with a null pointer of the element type of `tensor`.
template <typename F>
void with_element_type(const char* op, const Tensor& tensor, const char* argument, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<c10::Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<c10::BFloat16*>(nullptr));
    default:
      fail_argument(op, argument, "of dtype float32, float16 or bfloat16", tensor);
  }
}

inline std::vector<float> to_float(const char* op, const Tensor& tensor, const char* argument) {
  const Tensor dense = as_contiguous(tensor);
  std::vector<float> out(dense.numel());
  with_element_type(op, dense, argument, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(dense.const_data_ptr());
    std::copy(data, data + out.size(), out.begin());
  });
  return out;
}

// [..., N] for x of [..., K]; refuses sizes whose product overflows.
inline Tensor new_output(const char* op, const char* argument, const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes(x.dim()), strides(x.dim());
  int64_t count = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    sizes[i] = i + 1 < x.dim() ? x.size(i) : N;
    strides[i] = count;
    COMPRESSOPS_CHECK(!__builtin_mul_overflow(count, std::max<int64_t>(1, sizes[i]), &count), op,
                      argument, "of rows whose results have less than 2^63 elements", x);
  }
  // Not torch::stable::new_empty, which asks the dispatcher, and looks the op up by its name.
  AtenTensorHandle out = nullptr;
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// The rows of x [M][K] to 8 bits, q_stride bytes apart, padded with the code of 0.0. Calls
// done(m, scale) after row m, in the thread that made it.
template <typename T, typename F>
void quantize_rows(const T* x, int64_t M, int64_t K, int64_t padded, const Quantization& how,
                   uint8_t* q, int64_t q_stride, F&& done) {
  const QuantizeRow quantize = quantize_row();
  // A thread is worth starting for about 16 K elements.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, K));
  torch::stable::parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(std::is_same_v<T, float> ? 0 : K);
    for (int64_t m = begin; m < end; ++m) {
      const float* values;
      if constexpr (std::is_same_v<T, float>) {
        values = x + m * K;
      } else {
        std::copy(x + m * K, x + (m + 1) * K, buffer.begin());
        values = buffer.data();
      }
      done(m, quantize(values, q + m * q_stride, K, padded, how));
    }
  });
}

}  // namespace compressops::cpu
