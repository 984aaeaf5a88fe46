// What the linear ops share: activations, element types.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "gelu.h"

namespace compressops::cpu {

enum class Activation { kNone, kRelu, kGelu };

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  COMPRESSOPS_CHECK(name == "gelu", op, "activation", "'none', 'relu' or 'gelu'", name);
  return Activation::kGelu;
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
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<float> out(dense.numel());
  with_element_type(op, dense, argument, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(dense.const_data_ptr());
    std::copy(data, data + out.size(), out.begin());
  });
  return out;
}

}  // namespace compressops::cpu
