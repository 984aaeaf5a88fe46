#include <string>
#include <vector>

#include "int8_conv2d.cuh"
#include "int8_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "int8_conv2d";

// Which form a weight of so many channels, C and K of a group, is packed in.
Int8Conv2dForm form_of(const Tensor& weight, int64_t groups, int64_t C, int64_t K) {
  if (groups > 1 && C == 1 && K == 1) return Int8Conv2dForm::kChannels;
  const bool few =
      weight.dim() == 7 ? weight.size(5) != 1 : groups > 1 && C * K < kInt8Conv2dMatrix;
  return few ? Int8Conv2dForm::kPanels : Int8Conv2dForm::kTile;
}

// Of arguments that have been checked, the weight excepted, whose kernel size this takes.
Int8Conv2dShape checked_shape(const Tensor& x, const Tensor& weight, int64_t all_K,
                              const std::vector<int64_t>& stride,
                              const std::vector<int64_t>& padding,
                              const std::vector<int64_t>& dilation, int64_t groups, int64_t most) {
  const int64_t C = x.size(1) / groups, K = all_K / groups, dims = weight.dim();
  constexpr const char* kText =
      "an int8 tensor [K, C / groups, R, S] on x's device or as int8_conv2d_pack makes it";
  COMPRESSOPS_CHECK(same_device(weight, x) && weight.scalar_type() == ScalarType::Char &&
                        (dims == 4 || dims == 5 || dims == 7),
                    kOp, "weight", kText, weight);
  const Int8Conv2dForm form = form_of(weight, groups, C, K);
  const int64_t R = weight.size(dims == 5 ? 1 : 2), S = weight.size(dims == 5 ? 2 : 3);
  const int64_t panel = form_panel(form), depth = form_depth(form);
  std::vector<int64_t> expected = {all_K, C, R, S};
  if (dims == 5) expected = {ceil_div(groups, panel), R, S, panel, depth};
  if (dims == 7) {
    expected = {groups, ceil_div(K, panel), R, S, ceil_div(C, depth), panel, depth};
  }
  bool fits = R >= 1 && S >= 1 && (dims == 4 || (dims == 5) == (form == Int8Conv2dForm::kChannels));
  for (int64_t i = 0; i < dims; ++i) fits = fits && weight.size(i) == expected[i];
  COMPRESSOPS_CHECK(fits, kOp, "weight",
                    std::string(kText) + " for K = " + std::to_string(all_K) +
                        ", C / groups = " + std::to_string(C),
                    weight);
  COMPRESSOPS_CHECK(R <= most && S <= most && R * S <= most && C <= most && C * R * S <= most, kOp,
                    "weight", "of at most " + std::to_string(most) + " inputs an output", weight);
  const int64_t H = x.size(2), W = x.size(3);
  // Coordinates are counted in 32 bits.
  COMPRESSOPS_CHECK(H + 2 * padding[0] <= 0x7fffffff && W + 2 * padding[1] <= 0x7fffffff, kOp,
                    "padding", "such that an image with it has fewer than 2^31 rows and columns",
                    std::to_string(padding[0]) + ", " + std::to_string(padding[1]));
  const int64_t OH = out_size(H, R, stride[0], padding[0], dilation[0]);
  const int64_t OW = out_size(W, S, stride[1], padding[1], dilation[1]);
  COMPRESSOPS_CHECK(OH >= 1 && OW >= 1, kOp, "x",
                    "at least as large as the kernel, padding included", x);
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {x.size(0),
          groups,
          C,
          K,
          narrow(H),
          narrow(W),
          narrow(OH),
          narrow(OW),
          narrow(R),
          narrow(S),
          narrow(stride[0]),
          narrow(stride[1]),
          narrow(padding[0]),
          narrow(padding[1]),
          narrow(dilation[0]),
          narrow(dilation[1]),
          form};
}

// As the kernels read it: packed, and aligned for 16 bytes at once. A view may begin anywhere.
Tensor packed_weight(const Tensor& weight, const Int8Conv2dShape& shape, cudaStream_t stream) {
  const Tensor dense = torch::stable::contiguous(weight);
  if (weight.dim() != 4) {
    return misalignment(data_of<int8_t>(dense), 16) == 0 ? dense : torch::stable::clone(dense);
  }
  const Tensor packed = torch::stable::new_empty(dense, {shape.weight_bytes()});
  check_cuda(
      launch_int8_conv2d_pack(shape, data_of<int8_t>(dense), data_of<int8_t>(packed), stream), kOp);
  return packed;
}

template <class T>
void run(const Int8Conv2dShape& shape, const Tensor& x, const Tensor& weight,
         const Tensor& weight_scales, const Tensor& weight_sums, const OptionalTensor& bias,
         Activation activation, const Int8Quantization& how, const Tensor& y) {
  const bool last = is_channels_last(x);
  const int64_t channels = shape.groups * shape.C, image = shape.in_pixels() * channels;
  const ImageCodes codes = shape.codes();
  const int64_t parts = range_parts(image);
  const Tensor ranges = torch::stable::new_empty(x, {codes.N, parts, 2}, ScalarType::Int);
  const Tensor q = torch::stable::new_empty(x, {codes.N, codes.image_bytes()}, ScalarType::Char);
  const Tensor x_scales = torch::stable::new_empty(x, {codes.N}, ScalarType::Float);
  const OptionalTensor x_zeros = how.new_zeros(x, codes.N);
  const QuantizeImagesArgs<T> input = {codes,
                                       data_of<T>(x),
                                       x.stride(0),
                                       last ? 1 : shape.in_pixels(),
                                       last ? channels : 1,
                                       parts,
                                       data_of<unsigned>(ranges),
                                       data_of<int8_t>(q),
                                       data_of<float>(x_scales),
                                       how.row_zeros(x_zeros)};
  const Int8Conv2dArgs<T> args = {shape,
                                  input,
                                  data_of<int8_t>(weight),
                                  data_of<float>(weight_scales),
                                  data_of<int>(weight_sums),
                                  data_of<float>(bias),
                                  activation,
                                  how.scaling,
                                  data_of<T>(y),
                                  is_channels_last(y)};
  check_cuda(launch_int8_conv2d(args, multiprocessor_count(x, kOp), current_stream(x, kOp)), kOp);
}

Tensor int8_conv2d(const Tensor& x, const Tensor& weight, const Tensor& weight_scales,
                   const Tensor& weight_sums, const OptionalTensor& bias,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups,
                   const std::string& activation_name, const OptionalTensor& x_scale,
                   const OptionalTensor& x_zero, bool symmetric) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() == 4 && is_float_dtype(x) && x.size(1) >= 1 &&
                        x.size(2) >= 1 && x.size(3) >= 1,
                    kOp, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [N, C, H, W], empty in N alone", x);
  check_pair(kOp, "stride", stride, 1);
  check_pair(kOp, "padding", padding, 0);
  check_pair(kOp, "dilation", dilation, 1);
  COMPRESSOPS_CHECK(weight_scales.dim() == 1 && weight_scales.size(0) >= 1, kOp, "weight_scales",
                    "of one dimension, not empty", weight_scales);
  const int64_t K = weight_scales.size(0);
  COMPRESSOPS_CHECK(groups >= 1 && x.size(1) % groups == 0 && K % groups == 0, kOp, "groups",
                    "a divisor of " + std::to_string(x.size(1)) + " input and " +
                        std::to_string(K) + " output channels",
                    groups);
  const Int8Quantization how = checked_quantization(kOp, x, x_scale, x_zero, symmetric);
  const Int8Conv2dShape shape =
      checked_shape(x, weight, K, stride, padding, dilation, groups, how.max_terms());
  check_operand(kOp, weight_scales, "weight_scales", "float32", ScalarType::Float, {K}, x);
  check_operand(kOp, weight_sums, "weight_sums", "int32", ScalarType::Int, {K}, x);
  const OptionalTensor float_bias = checked_bias(kOp, bias, K, x);
  const Activation activation = parse_activation(activation_name, kOp);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool last = is_channels_last(x);
  const Tensor y = new_images(x, {shape.N, K, shape.OH, shape.OW}, last);
  if (y.numel() == 0) return y;
  // Images without gaps are read where they are.
  const Tensor dense_x = last ? x : torch::stable::contiguous(x);
  const Tensor packed = packed_weight(weight, shape, current_stream(x, kOp));
  const Tensor scales = torch::stable::contiguous(weight_scales);
  const Tensor sums = torch::stable::contiguous(weight_sums);
  with_element_type(x, [&](auto element) {
    run<decltype(element)>(shape, dense_x, packed, scales, sums, float_bias, activation, how, y);
  });
  return y;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("int8_conv2d", TORCH_BOX(&compressops::int8_conv2d));
}
