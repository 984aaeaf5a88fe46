#include <optional>
#include <string>
#include <vector>

#include "stable_cuda.h"
#include "winograd_conv2d.cuh"

namespace compressops {
namespace {

constexpr const char* kOp = "winograd_conv2d";

WinogradStrides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

template <class T>
void run(const WinogradShape& shape, const Tensor& x, const Tensor& transformed,
         const std::optional<Tensor>& bias, Activation activation, const Tensor& y) {
  WinogradArgs<T> args = {};
  args.shape = shape;
  args.x = static_cast<const T*>(x.const_data_ptr());
  args.x_strides = strides_of(x);
  args.u = static_cast<const T*>(transformed.const_data_ptr());
  args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  args.activation = activation;
  args.y = static_cast<T*>(y.mutable_data_ptr());
  args.y_strides = strides_of(y);
  const WinogradPlan plan =
      plan_winograd_conv2d(args, multiprocessor_count(x, kOp), shared_bytes_of_a_block(x, kOp),
                           device_attribute(x, cudaDevAttrL2CacheSize, kOp));
  const Tensor scratch = torch::stable::new_empty(x, {plan.scratch_bytes()}, ScalarType::Byte);
  check_cuda(launch_winograd_conv2d(args, plan, static_cast<int4*>(scratch.mutable_data_ptr()),
                                    current_stream(x, kOp)),
             kOp);
}

Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const Tensor& transformed,
                       const std::optional<Tensor>& bias, std::vector<int64_t> padding,
                       int64_t groups, const std::string& activation_name, int64_t tile) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() == 4 && is_float_dtype(x), kOp, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [N, C, H, W]", x);
  COMPRESSOPS_CHECK(groups >= 1 && x.size(1) % groups == 0, kOp, "groups",
                    "a divisor of " + std::to_string(x.size(1)) + " channels", groups);
  const int64_t C = x.size(1) / groups;
  // Steps over channels are counted in 32 bits, up to a whole one beyond the last.
  COMPRESSOPS_CHECK(C <= 0x7fffffff - 64, kOp, "x", "of at most 2^31 - 65 channels a group", x);
  COMPRESSOPS_CHECK(same_device(weight, x) && weight.dim() == 4 &&
                        weight.scalar_type() == x.scalar_type() && weight.size(1) == C &&
                        weight.size(0) % groups == 0 && weight.size(3) >= 2 &&
                        (weight.size(2) == 1 || weight.size(2) == weight.size(3)),
                    kOp, "weight",
                    "of x's dtype and device, [K, " + std::to_string(C) + ", r, r] or [K, " +
                        std::to_string(C) + ", 1, r] with K a multiple of groups",
                    weight);
  const int64_t K = weight.size(0), r = weight.size(3), alpha = tile + r - 1;
  COMPRESSOPS_CHECK(
      (tile == 2 || tile == 4 || tile == 6) && (alpha == 4 || alpha == 6 || alpha == 8), kOp,
      "tile", "2, 4 or 6 with tile + " + std::to_string(r) + " - 1 of 4, 6 or 8", tile);
  check_padding(kOp, padding);
  const Activation activation = parse_activation(activation_name, kOp);

  const WinogradShape shape =
      make_winograd_shape(x.size(0), groups, C, K / groups, x.size(2), x.size(3), padding[0],
                          padding[1], r, tile, weight.size(2) == 1);
  COMPRESSOPS_CHECK(shape.OH >= 1 && shape.OW >= 1, kOp, "x",
                    "at least as large as the kernel, padding included", x);
  const std::string form = "[" + std::to_string(shape.positions()) + ", " + std::to_string(K) +
                           ", " + std::to_string(C) + "]";
  COMPRESSOPS_CHECK(same_device(transformed, x) && transformed.scalar_type() == x.scalar_type() &&
                        transformed.dim() == 3 && transformed.size(0) == shape.positions() &&
                        transformed.size(1) == K && transformed.size(2) == C,
                    kOp, "transformed",
                    "of x's dtype and device, " + form + " as winograd_conv2d_pack makes it",
                    transformed);
  const OptionalTensor float_bias = checked_bias(kOp, bias, K, x);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = new_images(x, {shape.N, K, shape.OH, shape.OW}, is_channels_last(x));
  if (y.numel() == 0) return y;
  const Tensor u = torch::stable::contiguous(transformed);
  with_element_type(
      x, [&](auto element) { run<decltype(element)>(shape, x, u, float_bias, activation, y); });
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&compressops::winograd_conv2d));
}
