// int4_linear on a CPU: 4-bit weights with a scale a group, activations quantized to int8 by rows
// or as they are.
#include <torch/csrc/stable/library.h>

#include "packed_linear.h"

namespace compressops::cpu {
namespace {

Tensor int4_linear(const Tensor& x, const Tensor& weight, const Tensor& scales,
                   const std::optional<Tensor>& zeros, int64_t out_features,
                   std::optional<int64_t> group_size, const std::optional<Tensor>& bias,
                   const std::string& activation, bool quantize_x) {
  return packed_linear({"int4_linear", 4, 8}, x, weight, scales, zeros, out_features, group_size,
                       bias, activation, quantize_x);
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("int4_linear", TORCH_BOX(&compressops::cpu::int4_linear));
}
