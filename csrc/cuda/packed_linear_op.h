// The ops int4_linear and ternary_linear on CUDA tensors: checks, scratch, and the launches. Host
// code only.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "packed_linear_launch.cuh"
#include "quantize_rows.cuh"
#include "stable_cuda.h"

namespace compressops {

struct PackedLinearCall {
  const char* op;
  int64_t M, N, K, row_stride;
  Tensor rows;  // x as a matrix with dense rows
  Tensor weight, scales;
  OptionalTensor zeros, bias;
  int64_t group_size;
  Activation activation;
  Tensor y;
};

// The product of x, whose rows are x_row_stride elements apart and can be read up to x_columns.
template <int kBits, class Input>
void multiply_packed(const PackedLinearCall& call, Global<const Input> x, int64_t x_row_stride,
                     int64_t x_columns, int64_t parts, Global<const float> x_scales) {
  const PackedLinearDevice device = {multiprocessor_count(call.rows, call.op),
                                     compute_capability(call.rows, call.op),
                                     shared_bytes_of_a_block(call.rows, call.op)};
  const bool hopper = packed_linear_fits_wgmma<kBits, Input>(call.M, call.N, call.K, parts,
                                                             call.group_size, device.capability);
  PackedLinearPlan plan = plan_packed_linear(call.M, call.N, call.K, parts, device, hopper);
  plan.early = x_scales != nullptr && device.capability >= 90;  // quantize_rows has just begun
  COMPRESSOPS_CHECK(plan.kernel != PackedLinearKernel::kAuto, call.op, "x",
                    "on a GPU of compute capability 8.0 or more", int64_t{device.capability});
  const cudaStream_t stream = current_stream(call.rows, call.op);
  OptionalTensor partials, tickets;
  if (plan.splits > 1) {
    partials = torch::stable::new_empty(call.rows, {plan.partials}, ScalarType::Float);
    tickets = stream_tickets(call.rows, plan.tiles, stream, call.op);
  }
  const ScalarType dtype = call.y.scalar_type();
  const PackedLinearArgs<Input> args = {call.M,
                                        call.N,
                                        call.K,
                                        x,
                                        x_row_stride,
                                        x_columns,
                                        parts,
                                        x_scales,
                                        static_cast<const int4*>(call.weight.const_data_ptr()),
                                        static_cast<const float*>(call.scales.const_data_ptr()),
                                        data_of<uint8_t>(call.zeros),
                                        call.group_size,
                                        data_of<float>(call.bias),
                                        call.activation,
                                        plan.splits,
                                        partials ? data_of<float>(*partials) : nullptr,
                                        tickets ? data_of<unsigned>(*tickets) : nullptr,
                                        dtype == ScalarType::Half       ? FloatType::kHalf
                                        : dtype == ScalarType::BFloat16 ? FloatType::kBfloat16
                                                                        : FloatType::kFloat,
                                        data_of<uint8_t>(call.y)};
  check_cuda(launch_packed_linear<kBits>(args, plan, device.multiprocessors, stream), call.op);
}

template <int kBits, class T>
void multiply_quantized(const PackedLinearCall& call) {
  const int64_t columns = padded_to_16(call.K);
  const Tensor q = torch::stable::new_empty(call.rows, {call.M * columns}, ScalarType::Char);
  const Tensor x_scales = torch::stable::new_empty(call.rows, {call.M}, ScalarType::Float);
  check_cuda(launch_quantize_rows<T>(static_cast<const T*>(call.rows.const_data_ptr()),
                                     call.row_stride, call.M, call.K, data_of<int8_t>(q),
                                     data_of<float>(x_scales), current_stream(call.rows, call.op)),
             call.op);
  multiply_packed<kBits, int8_t>(call, data_of<int8_t>(q), columns, columns, 1,
                                 data_of<float>(x_scales));
}

template <int kBits>
void multiply_quantized(const PackedLinearCall& call) {
  switch (call.rows.scalar_type()) {
    case ScalarType::Half:
      return multiply_quantized<kBits, __half>(call);
    case ScalarType::BFloat16:
      return multiply_quantized<kBits, __nv_bfloat16>(call);
    default:
      return multiply_quantized<kBits, float>(call);
  }
}

// Checks what a kernel relies on; `run` gets the call with y to be filled, which is not empty.
template <int kBits, class Run>
Tensor run_packed_linear(const char* op, const Tensor& x, const Tensor& weight,
                         const Tensor& scales, const OptionalTensor& zeros, int64_t out_features,
                         std::optional<int64_t> group_size, const OptionalTensor& bias,
                         const std::string& activation, const Run& run) {
  COMPRESSOPS_CHECK(x.is_cuda() && x.dim() >= 1 && is_float_dtype(x), op, "x",
                    "a CUDA float32, float16 or bfloat16 tensor [..., K]", x);
  const int64_t N = out_features, K = x.size(x.dim() - 1);
  COMPRESSOPS_CHECK(K <= kPackedLinearMaxK, op, "x", "at most 131072 wide (int32 sums)", x);
  COMPRESSOPS_CHECK(N >= 0, op, "out_features", "0 or more", N);
  if (group_size) {
    COMPRESSOPS_CHECK(*group_size > 0 && *group_size % kGroupMultiple == 0, op, "group_size",
                      "None or a positive multiple of 16", *group_size);
  }
  const int64_t group = group_size && *group_size < K ? *group_size : K;
  const int64_t groups = K == 0 ? 0 : ceil_div(K, group);
  const auto check = [&](const Tensor& tensor, const char* argument, const char* dtype_name,
                         ScalarType dtype, const std::vector<int64_t>& shape) {
    bool fits = same_device(tensor, x) && tensor.scalar_type() == dtype &&
                tensor.dim() == static_cast<int64_t>(shape.size());
    std::string text;
    for (size_t i = 0; i < shape.size(); ++i) {
      fits = fits && tensor.size(static_cast<int64_t>(i)) == shape[i];
      text += (i ? ", " : "") + std::to_string(shape[i]);
    }
    COMPRESSOPS_CHECK(
        fits, op, argument,
        std::string(dtype_name) + " [" + text + "] on x's device, as " + op + "_pack makes it",
        tensor);
  };
  check(weight, "weight", "uint8", ScalarType::Byte,
        {ceil_div<int64_t>(N, 8 * kLaneOutputs<kBits>), ceil_div<int64_t>(K, kStepK), 512});
  check(scales, "scales", "float32", ScalarType::Float, {groups, N});
  if (zeros) check(*zeros, "zeros", "uint8", ScalarType::Byte, {groups, N});
  const OptionalTensor float_bias = checked_bias(op, bias, N, x);
  const Activation parsed = parse_activation(activation, op);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  std::vector<int64_t> y_sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) y_sizes.push_back(x.size(i));
  y_sizes.push_back(N);
  const Tensor y = torch::stable::new_empty(x, y_sizes);  // refuses sizes whose product overflows
  const int64_t M = N == 0 ? 0 : y.numel() / N;
  if (M == 0 || N == 0) return y;

  // A matrix whose rows are dense is read where it is; all else is copied.
  const bool dense_rows = x.dim() == 2 && (K <= 1 || x.stride(1) == 1) && x.stride(0) >= K;
  Tensor dense_weight = torch::stable::contiguous(weight);
  // The lanes read 16 bytes at once; a view may begin anywhere.
  if (misalignment(static_cast<const uint8_t*>(dense_weight.const_data_ptr()), 16) != 0) {
    dense_weight = torch::stable::clone(dense_weight);
  }
  OptionalTensor dense_zeros;
  if (zeros) dense_zeros = torch::stable::contiguous(*zeros);
  run(PackedLinearCall{
      op, M, N, K, dense_rows ? x.stride(0) : K, dense_rows ? x : torch::stable::contiguous(x),
      dense_weight, torch::stable::contiguous(scales), dense_zeros, float_bias, group, parsed, y});
  return y;
}

}  // namespace compressops
