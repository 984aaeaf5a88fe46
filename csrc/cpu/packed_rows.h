// The activations of int4_linear and ternary_linear on a CPU, in the two forms that are multiplied:
// quantized to int8, and as they are. Up to 24 quantized rows read the packed weights as they are,
// from memory, which is what limits them. All others unpack a part of a panel, into L1, and pass
// over it in register blocks.
#pragma once

#include <memory>

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
  const uint8_t* panel_codes(int64_t panel) const {
    return codes + panel * kPackedPanel * depth() * bits / 8;
  }
  int width(int64_t panel) const {
    return (int)std::min<int64_t>(kPackedPanel, padded_N() - panel * kPackedPanel);
  }
};

// Calls f(r0, r1) for parts of [0, rows), none above `most` and all about alike: 9 rows as 5 and 4,
// not as 8 and 1.
template <typename F>
void for_row_blocks(int64_t rows, int64_t most, F&& f) {
  const int64_t blocks = ceil_div(rows, most);
  for (int64_t b = 0; b < blocks; ++b) f(b * rows / blocks, (b + 1) * rows / blocks);
}

// Rows of int8 codes, each with its scale.
class QuantizedRows {
 public:
  template <typename T>
  QuantizedRows(const PackedProducts& isa, const T* x, int64_t M, const Weight& weight)
      : isa_(isa),
        weight_(weight),
        // An odd number of cache lines: the rows of a block shall not share the sets of L1.
        stride_((ceil_div(weight.depth(), 128) * 2 + 1) * 64),
        direct_(M <= kDirect),
        codes_(new int8_t[M * stride_]),
        scales_(M),
        shifts_(M * weight.groups) {
    int8_t* q = codes_.get();
    quantize_rows(x, M, weight.K, weight.depth(), {}, reinterpret_cast<uint8_t*>(q), stride_,
                  [&](int64_t m, RowScale row) {
                    scales_[m] = row.scale;
                    int32_t* shifts = shifts_.data() + m * weight.groups;
                    isa.sum_groups(q + m * stride_, weight.depth(), weight.group, shifts);
                    const int32_t zero = weight.zeros == nullptr ? -weight.zero : -1;
                    for (int64_t g = 0; g < weight.groups; ++g) shifts[g] *= zero;
                  });
  }

  float scale(int64_t m) const { return scales_[m]; }

  // Bytes that a thread needs.
  int64_t scratch() const { return direct_ ? 1 : span() * kPackedPanel; }

  // Columns of one panel, rows [begin, end): y is [end - begin][width].
  void multiply(int64_t panel, int64_t begin, int64_t end, uint8_t* scratch, float* y) const {
    const int width = weight_.width(panel);
    const int64_t depth = weight_.depth(), rows = end - begin;
    const uint8_t* codes = weight_.panel_codes(panel);
    const int64_t offset = panel * kPackedPanel * weight_.groups;
    const int8_t* q = codes_.get() + begin * stride_;
    PackedGroups groups{weight_.scales + offset,
                        weight_.zeros == nullptr ? nullptr : weight_.zeros + offset,
                        shifts_.data() + begin * weight_.groups, weight_.groups};
    std::fill(y, y + rows * width, 0.0f);
    if (direct_) {
      for_row_blocks(rows, kPackedDirectRows, [&](int64_t r0, int64_t r1) {
        PackedGroups now = groups;
        now.shifts += r0 * weight_.groups;
        isa_.multiply_packed(weight_.bits, q + r0 * stride_, stride_, codes, width, depth,
                             weight_.group, (int)(r1 - r0), now, y + r0 * width);
      });
      return;
    }
    for (int64_t start = 0; start < depth; start += span()) {
      const int64_t length = std::min(span(), depth - start);
      isa_.unpack(weight_.bits, codes + start / weight_.inputs() * width * 4, width,
                  length / weight_.inputs(), scratch);
      for_row_blocks(rows, kPackedRows, [&](int64_t r0, int64_t r1) {
        PackedGroups now = groups;
        now.shifts += r0 * weight_.groups;
        isa_.multiply(q + r0 * stride_ + start, stride_, scratch, width, length, weight_.group,
                      (int)(r1 - r0), now, y + r0 * width);
      });
      const int64_t done = ceil_div(length, weight_.group);
      groups.scales += done * width;
      if (groups.zeros != nullptr) groups.zeros += done * width;
      groups.shifts += done;
    }
  }

 private:
  // With more rows than these, codes are unpacked before they are multiplied.
  static constexpr int64_t kDirect = 3 * kPackedDirectRows;

  // So many inputs of a panel are unpacked at a time: whole groups, and 16 KB, half of L1, where a
  // group is not more.
  int64_t span() const { return std::max<int64_t>(1, 512 / weight_.group) * weight_.group; }

  const PackedProducts& isa_;
  const Weight& weight_;
  int64_t stride_;  // of codes
  bool direct_;
  std::unique_ptr<int8_t[]> codes_;  // [M][depth]
  std::vector<float> scales_;        // [M]
  std::vector<int32_t> shifts_;      // [M][groups], see PackedGroups
};

// Rows of float32 values. The weight has 4 bits.
class FloatRows {
 public:
  template <typename T>
  FloatRows(const PackedProducts& isa, const T* x, int64_t M, const Weight& weight)
      : isa_(isa),
        weight_(weight),
        // As above; the kernels read whole words of inputs.
        stride_((ceil_div(weight.depth(), 32) * 2 + 1) * 16),
        values_(new float[M * stride_]) {
    float* values = values_.get();
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, weight.K));
    torch::stable::parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        float* row = values + m * stride_;
        std::copy(x + m * weight.K, x + (m + 1) * weight.K, row);
        std::fill(row + weight.K, row + weight.depth(), 0.0f);
      }
    });
  }

  float scale(int64_t) const { return 1.0f; }

  int64_t scratch() const { return kSpan * kPackedPanel * sizeof(float); }

  void multiply(int64_t panel, int64_t begin, int64_t end, uint8_t* scratch, float* y) const {
    const int width = weight_.width(panel);
    const int64_t rows = end - begin;
    const uint8_t* codes = weight_.panel_codes(panel);
    const float* x = values_.get() + begin * stride_;
    float* dense = reinterpret_cast<float*>(scratch);
    std::fill(y, y + rows * width, 0.0f);
    for (int64_t g = 0; g < weight_.groups; ++g) {
      const int64_t group_end = std::min((g + 1) * weight_.group, weight_.depth());
      const int64_t offset = panel * kPackedPanel * weight_.groups + g * width;
      const uint8_t* zeros = weight_.zeros == nullptr ? nullptr : weight_.zeros + offset;
      for (int64_t start = g * weight_.group; start < group_end; start += kSpan) {
        const int64_t length = std::min(kSpan, group_end - start);
        isa_.dequantize(codes + start / 8 * width * 4, width, length / 8, weight_.scales + offset,
                        zeros, weight_.zero, dense);
        for_row_blocks(rows, kPackedRows, [&](int64_t r0, int64_t r1) {
          isa_.multiply_float(x + r0 * stride_ + start, stride_, dense, width, length,
                              (int)(r1 - r0), y + r0 * width);
        });
      }
    }
  }

 private:
  // Inputs that are dequantized at a time: 16 KB of a panel, half of L1.
  static constexpr int64_t kSpan = 128;

  const PackedProducts& isa_;
  const Weight& weight_;
  int64_t stride_;
  std::unique_ptr<float[]> values_;  // [M][stride]
};

}  // namespace packed
}  // namespace compressops::cpu
