#include <string>
#include <vector>

#include "bsr_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "bsr_conv2d";
constexpr int64_t kMost = 0x7fffffff;

// Of images [N, C, H, W] and steps that have been checked.
BsrWindows checked_windows(const Tensor& x, const std::vector<int64_t>& kernel_size,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), R = kernel_size[0], S = kernel_size[1];
  COMPRESSOPS_CHECK(R <= kMost / S && C <= kMost / (R * S), kOp, "kernel_size",
                    "such that a window has fewer than 2^31 inputs",
                    std::to_string(R) + ", " + std::to_string(S));
  // Coordinates are counted in 32 bits.
  COMPRESSOPS_CHECK(H <= kMost - 2 * padding[0] && W <= kMost - 2 * padding[1], kOp, "padding",
                    "such that an image with it has fewer than 2^31 rows and columns",
                    std::to_string(padding[0]) + ", " + std::to_string(padding[1]));
  const int64_t OH = out_size(H, R, stride[0], padding[0], dilation[0]);
  const int64_t OW = out_size(W, S, stride[1], padding[1], dilation[1]);
  COMPRESSOPS_CHECK(OH >= 1 && OW >= 1, kOp, "x",
                    "at least as large as the kernel, padding included", x);
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {narrow(H),          narrow(W),          narrow(C),           narrow(OH),
          narrow(OW),         narrow(S),          narrow(stride[0]),   narrow(stride[1]),
          narrow(padding[0]), narrow(padding[1]), narrow(dilation[0]), narrow(dilation[1])};
}

// [N, H, W, C] without gaps, on 16 bytes.
Tensor pixels_of(const Tensor& x) {
  return on_16_bytes(torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3));
}

Tensor bsr_conv2d(const Tensor& x, const Tensor& values, const Tensor& crow_indices,
                  const Tensor& col_indices, int64_t out_channels, std::vector<int64_t> kernel_size,
                  const OptionalTensor& bias, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                  const std::string& activation_name, const OptionalTensor& row_order) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() == 4 && is_float_dtype(x) && x.size(1) >= 1 &&
                        x.size(2) >= 1 && x.size(3) >= 1,
                    kOp, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [N, C, H, W], empty in N alone", x);
  check_pair(kOp, "kernel_size", kernel_size, 1);
  check_pair(kOp, "stride", stride, 1);
  check_pair(kOp, "padding", padding, 0);
  check_pair(kOp, "dilation", dilation, 1);
  const BsrWindows windows = checked_windows(x, kernel_size, stride, padding, dilation);
  const ScalarType dtype = common_dtype(x, values);
  const int64_t piece = dtype == ScalarType::Float ? 4 : 8;
  COMPRESSOPS_CHECK(windows.C % piece == 0, kOp, "x",
                    "of a multiple of " + std::to_string(piece) + " channels", x);
  const int64_t N = out_channels, K = kernel_size[0] * kernel_size[1] * windows.C;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const BsrBlocks blocks =
      checked_blocks(kOp, values, crow_indices, col_indices, N, K, x, dtype, false, row_order);
  const OptionalTensor float_bias = checked_bias(kOp, bias, N, x);
  const Activation activation = parse_activation(activation_name, kOp);
  const Tensor y = new_images(x, {x.size(0), N, windows.OH, windows.OW}, true);
  if (y.numel() > 0) {
    with_common_type(x, values, [&](const Tensor& common, auto element) {
      using T = decltype(element);
      const Tensor pixels = pixels_of(common);
      BsrArgs<T> args{};
      args.M = y.numel() / N, args.N = N, args.K = K;
      args.x = data_of<T>(pixels);
      args.x_columns = K;
      args.windows = windows;
      args.bias = data_of<float>(float_bias);
      args.activation = activation;
      multiply_blocks<false, true>(kOp, blocks, args, blocks.crow, blocks.col, y);
    });
  }
  return is_channels_last(x) ? y : torch::stable::contiguous(y);
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("bsr_conv2d", TORCH_BOX(&compressops::bsr_conv2d));
}
