// int4_linear and ternary_linear on a CPU: multiply rows by the codes of a panel, group by group,
// scale, add the bias and activate while the sums are in L1.
#pragma once

#include <optional>

#include "packed_rows.h"

namespace compressops::cpu {

// The int32 sums hold so many inputs.
constexpr int64_t kMaxPackedDepth = 131072;

struct PackedLinear {
  const char* op;
  int bits;
  int zero;  // the code of 0.0 where there are no zero points
};

namespace packed {

template <typename T>
void finish_row(float* y, float scale, const float* bias, int64_t columns, Activation activation,
                T* out) {
  for (int64_t n = 0; n < columns; ++n) y[n] *= scale;
  if (bias != nullptr)
    for (int64_t n = 0; n < columns; ++n) y[n] += bias[n];
  if (activation == Activation::kRelu)
    for (int64_t n = 0; n < columns; ++n) y[n] = y[n] < 0.0f ? 0.0f : y[n];  // keeps NaN
  if (activation == Activation::kGelu) gelu()(y, columns);
  std::copy(y, y + columns, out);
}

// A task is a panel and up to so many rows: both stay in L2.
constexpr int64_t kTaskRows = 128;

template <typename Rows, typename T>
void run(const Weight& weight, const T* x, int64_t M, const float* bias, Activation activation,
         T* out) {
  const Rows rows(packed_products(), x, M, weight);
  const int64_t panels = ceil_div(weight.N, kPackedPanel), row_tasks = ceil_div(M, kTaskRows);
  const int64_t work = std::min(M, kTaskRows) * kPackedPanel * std::max<int64_t>(1, weight.K);
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / work);
  torch::stable::parallel_for(0, panels * row_tasks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float y[kTaskRows * kPackedPanel];
    const std::unique_ptr<uint8_t[]> scratch(new uint8_t[rows.scratch()]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / row_tasks, part = task % row_tasks;
      const int64_t m0 = part * M / row_tasks, m1 = (part + 1) * M / row_tasks;
      rows.multiply(panel, m0, m1, scratch.get(), y);
      const int width = weight.width(panel);
      const int64_t n0 = panel * kPackedPanel;
      for (int64_t m = m0; m < m1; ++m)
        finish_row(y + (m - m0) * width, rows.scale(m), bias == nullptr ? nullptr : bias + n0,
                   std::min<int64_t>(width, weight.N - n0), activation, out + m * weight.N + n0);
    }
  });
}

inline void check_flat(const char* op, const char* argument, const Tensor& tensor, ScalarType type,
                       const char* type_name, int64_t numel) {
  COMPRESSOPS_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.scalar_type() == type &&
                        tensor.size(0) == numel,
                    op, argument,
                    std::string("a CPU ") + type_name + " tensor [" + std::to_string(numel) +
                        "], as " + op + "_pack makes it",
                    tensor);
}

}  // namespace packed

inline Tensor packed_linear(const PackedLinear& kind, const Tensor& x, const Tensor& weight,
                            const Tensor& scales, const std::optional<Tensor>& zeros,
                            int64_t out_features, std::optional<int64_t> group_size,
                            const std::optional<Tensor>& bias, const std::string& activation_name,
                            bool quantize_x = true) {
  const char* op = kind.op;
  COMPRESSOPS_CHECK(x.is_cpu() && x.dim() >= 1, op, "x", "a CPU tensor [..., K]", x);
  with_element_type(op, x, "x", [](auto*) {});
  packed::Weight packed{};
  packed.N = out_features, packed.K = x.size(x.dim() - 1);
  packed.bits = kind.bits, packed.zero = kind.zero;
  COMPRESSOPS_CHECK(packed.K <= kMaxPackedDepth, op, "x", "at most 131072 wide (int32 sums)", x);
  COMPRESSOPS_CHECK(packed.N >= 0 && packed.N <= int64_t{1} << 40, op, "out_features",
                    "from 0 to 2^40", packed.N);
  COMPRESSOPS_CHECK(!group_size || (*group_size >= 16 && *group_size % 16 == 0), op, "group_size",
                    "None or a positive multiple of 16", group_size.value_or(0));
  // A group longer than the row is the row: buffers are of a group's size.
  const int64_t row = std::max(packed.inputs(), packed.depth());
  packed.group = std::min(group_size.value_or(row), row);
  packed.groups = packed::ceil_div(packed.K, packed.group);
  packed::check_flat(op, "weight", weight, ScalarType::Byte, "uint8",
                     packed.padded_N() * packed.depth() * kind.bits / 8);
  packed::check_flat(op, "scales", scales, ScalarType::Float, "float32",
                     packed.padded_N() * packed.groups);
  if (zeros)
    packed::check_flat(op, "zeros", *zeros, ScalarType::Byte, "uint8",
                       packed.padded_N() * packed.groups);
  if (bias)
    COMPRESSOPS_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == packed.N, op, "bias",
                      "a CPU tensor [" + std::to_string(packed.N) + "]", *bias);
  const Activation activation = parse_activation(op, activation_name);
  const std::vector<float> biases = bias ? to_float(op, *bias, "bias") : std::vector<float>();

  Tensor out = new_output(op, "x", x, packed.N);
  const int64_t M = packed.N == 0 ? 0 : out.numel() / packed.N;
  if (M == 0) return out;

  const Tensor dense_x = as_contiguous(x);
  const Tensor dense_weight = as_contiguous(weight);
  const Tensor dense_scales = as_contiguous(scales);
  const Tensor dense_zeros = as_contiguous(zeros ? *zeros : weight);
  packed.codes = static_cast<const uint8_t*>(dense_weight.const_data_ptr());
  packed.scales = static_cast<const float*>(dense_scales.const_data_ptr());
  packed.zeros = zeros ? static_cast<const uint8_t*>(dense_zeros.const_data_ptr()) : nullptr;

  with_element_type(op, x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run =
        quantize_x ? packed::run<packed::QuantizedRows, T> : packed::run<packed::FloatRows, T>;
    run(packed, static_cast<const T*>(dense_x.const_data_ptr()), M,
        biases.empty() ? nullptr : biases.data(), activation,
        static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace compressops::cpu
