// ternary_linear on a CPU: weights -1, 0, 1 in 2 bits, activations quantized to int8 by rows.
#include <torch/csrc/stable/library.h>

#include "packed_linear.h"

namespace compressops::cpu {
namespace {

Tensor ternary_linear(const Tensor& x, const Tensor& weight, const Tensor& scales,
                      int64_t out_features, std::optional<int64_t> group_size,
                      const std::optional<Tensor>& bias, const std::string& activation) {
  return packed_linear({"ternary_linear", 2, 1}, x, weight, scales, std::nullopt, out_features,
                       group_size, bias, activation);
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("ternary_linear", TORCH_BOX(&compressops::cpu::ternary_linear));
}
