// int4_linear and ternary_linear on a CPU: quantize each row of x to int8, multiply by the codes,
// group by group, scale, add the bias and activate while the sums are in L1.
//
// Up to eight rows read the packed weights as they are, from memory, which is what limits them.
// More rows unpack a group of a panel once, into L1, and pass over it in register blocks.
#pragma once

#include <memory>
#include <optional>

#include "cpu_features.h"
#include "linear.h"
#include "packed_products.h"

namespace compressops::cpu {

inline const PackedProducts& packed_products() {
  const Features& cpu = features();
#if defined(__x86_64__)
  if (cpu.avx512_vnni) return packed_products_avx512();
  if (cpu.avx2) return packed_products_avx2();
#endif
  return packed_products_baseline();
}

// The int32 sums, and those of codes that count 16 times, hold so many inputs.
constexpr int64_t kMaxPackedDepth = 131072;

struct PackedLinear {
  const char* op;
  int bits;
  int zero;  // the code of 0.0 where there are no zero points
};

namespace packed {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As int4_linear_pack and ternary_linear_pack make it.
struct Weight {
  int64_t N, K, group, groups;
  int bits, zero;
  const uint8_t* codes;
  const float* scales;
  const uint8_t* zeros;  // or null

  int64_t inputs() const { return 32 / bits; }  // in a word
  int64_t depth() const { return ceil_div(K, inputs()) * inputs(); }
  int64_t padded_N() const { return ceil_div(N, 16) * 16; }
  int width(int64_t panel) const {
    return (int)std::min<int64_t>(kPackedPanel, padded_N() - panel * kPackedPanel);
  }
};

struct Rows {
  int64_t stride;                   // of codes
  std::unique_ptr<int8_t[]> codes;  // [M][depth]
  std::vector<float> scales;        // [M]
  std::vector<int32_t> shifts;      // [M][groups], see PackedGroups
};

template <typename T>
Rows quantize(const PackedProducts& isa, const T* x, int64_t M, const Weight& weight) {
  const int64_t depth = weight.depth();
  // An odd number of cache lines: the rows of a block shall not share the sets of L1.
  const int64_t stride = (ceil_div(depth, 128) * 2 + 1) * 64;
  Rows rows{stride, std::unique_ptr<int8_t[]>(new int8_t[M * stride]), std::vector<float>(M),
            std::vector<int32_t>(M * weight.groups)};
  int8_t* q = rows.codes.get();
  quantize_rows(x, M, weight.K, depth, {}, reinterpret_cast<uint8_t*>(q), stride,
                [&](int64_t m, RowScale row) {
                  rows.scales[m] = row.scale;
                  int32_t* shifts = rows.shifts.data() + m * weight.groups;
                  isa.sum_groups(q + m * stride, depth, weight.group, shifts);
                  const int32_t zero = weight.zeros == nullptr ? -weight.zero : -1;
                  for (int64_t g = 0; g < weight.groups; ++g) shifts[g] *= zero;
                });
  return rows;
}

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

// With more rows than these, codes are unpacked before they are multiplied.
constexpr int64_t kUnpackedFrom = 3 * kPackedDirectRows;

// So many inputs of a panel are unpacked at a time: whole groups, and 16 KB, half of L1, where a
// group is not more.
inline int64_t unpacked_span(const Weight& weight) {
  return std::max<int64_t>(1, 512 / weight.group) * weight.group;
}

// Columns of one panel, rows [begin, end): y is [end - begin][width].
inline void multiply_panel(const PackedProducts& isa, const Weight& weight, const Rows& rows,
                           int64_t panel, int64_t begin, int64_t end, uint8_t* unpacked, float* y) {
  const int width = weight.width(panel);
  const int64_t depth = weight.depth(), first = panel * kPackedPanel;
  const uint8_t* codes = weight.codes + first * depth * weight.bits / 8;
  const int64_t offset = first * weight.groups;
  const int8_t* q = rows.codes.get() + begin * rows.stride;
  PackedGroups groups{weight.scales + offset,
                      weight.zeros == nullptr ? nullptr : weight.zeros + offset,
                      rows.shifts.data() + begin * weight.groups, weight.groups};
  std::fill(y, y + (end - begin) * width, 0.0f);
  if (end - begin <= kUnpackedFrom) {
    const int64_t blocks = ceil_div(end - begin, kPackedDirectRows);
    for (int64_t b = 0; b < blocks; ++b) {
      // Evenly: 9 rows as 5 and 4, not as 8 and 1.
      const int64_t r0 = b * (end - begin) / blocks, r1 = (b + 1) * (end - begin) / blocks;
      PackedGroups now = groups;
      now.shifts += r0 * weight.groups;
      isa.multiply_packed(weight.bits, q + r0 * rows.stride, rows.stride, codes, width, depth,
                          weight.group, (int)(r1 - r0), now, y + r0 * width);
    }
    return;
  }
  const int64_t blocks = ceil_div(end - begin, kPackedRows), span = unpacked_span(weight);
  for (int64_t start = 0; start < depth; start += span) {
    const int64_t length = std::min(span, depth - start);
    isa.unpack(weight.bits, codes + start / weight.inputs() * width * 4, width,
               length / weight.inputs(), unpacked);
    for (int64_t b = 0; b < blocks; ++b) {
      // Evenly: 7 rows as 4 and 3, not as 6 and 1.
      const int64_t r0 = b * (end - begin) / blocks, r1 = (b + 1) * (end - begin) / blocks;
      PackedGroups now = groups;
      now.shifts += r0 * weight.groups;
      isa.multiply(q + r0 * rows.stride + start, rows.stride, unpacked, width, length, weight.group,
                   (int)(r1 - r0), now, y + r0 * width);
    }
    const int64_t done = ceil_div(length, weight.group);
    groups.scales += done * width;
    if (groups.zeros != nullptr) groups.zeros += done * width;
    groups.shifts += done;
  }
}

// A task is a panel and up to so many rows: both stay in L2.
constexpr int64_t kTaskRows = 16 * kPackedRows;

template <typename T>
void run(const Weight& weight, const T* x, int64_t M, const float* bias, Activation activation,
         T* out) {
  const PackedProducts& isa = packed_products();
  const Rows rows = quantize(isa, x, M, weight);
  const int64_t panels = ceil_div(weight.N, kPackedPanel), row_tasks = ceil_div(M, kTaskRows);
  const int64_t work = std::min(M, kTaskRows) * kPackedPanel * std::max<int64_t>(1, weight.K);
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / work);
  torch::stable::parallel_for(0, panels * row_tasks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float y[kTaskRows * kPackedPanel];
    const std::unique_ptr<uint8_t[]> unpacked(
        new uint8_t[M > kUnpackedFrom ? unpacked_span(weight) * kPackedPanel : 1]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / row_tasks, part = task % row_tasks;
      const int64_t m0 = part * M / row_tasks, m1 = (part + 1) * M / row_tasks;
      multiply_panel(isa, weight, rows, panel, m0, m1, unpacked.get(), y);
      const int width = weight.width(panel);
      const int64_t n0 = panel * kPackedPanel;
      for (int64_t m = m0; m < m1; ++m)
        finish_row(y + (m - m0) * width, rows.scales[m], bias == nullptr ? nullptr : bias + n0,
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
                            const std::optional<Tensor>& bias, const std::string& activation_name) {
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

  Tensor out = new_output(x, packed.N);
  const int64_t M = packed.N == 0 ? 0 : out.numel() / packed.N;
  if (M == 0) return out;

  const Tensor dense_x = torch::stable::contiguous(x);
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_scales = torch::stable::contiguous(scales);
  const Tensor dense_zeros = torch::stable::contiguous(zeros ? *zeros : weight);
  packed.codes = static_cast<const uint8_t*>(dense_weight.const_data_ptr());
  packed.scales = static_cast<const float*>(dense_scales.const_data_ptr());
  packed.zeros = zeros ? static_cast<const uint8_t*>(dense_zeros.const_data_ptr()) : nullptr;

  with_element_type(op, x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    packed::run(packed, static_cast<const T*>(dense_x.const_data_ptr()), M,
                biases.empty() ? nullptr : biases.data(), activation,
                static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace compressops::cpu
