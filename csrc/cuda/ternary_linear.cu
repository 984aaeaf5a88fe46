#include "packed_linear_op.h"

namespace compressops {
namespace {

Tensor ternary_linear(const Tensor& x, const Tensor& weight, const Tensor& scales,
                      int64_t out_features, std::optional<int64_t> group_size,
                      const OptionalTensor& bias, const std::string& activation) {
  return run_packed_linear<2>("ternary_linear", x, weight, scales, std::nullopt, out_features,
                              group_size, bias, activation,
                              [](const PackedLinearCall& call) { multiply_quantized<2>(call); });
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("ternary_linear", TORCH_BOX(&compressops::ternary_linear));
}
