#include <math.h>

#include "packed_products.h"

namespace compressops::cpu {
namespace {

void sum_groups(const int8_t* q, int64_t depth, int64_t group, int32_t* sums) {
  for (int64_t start = 0; start < depth; start += group, ++sums) {
    *sums = 0;
    for (int64_t k = start; k < depth && k < start + group; ++k) *sums += q[k];
  }
}

void unpack(int bits, const uint8_t* packed, int width, int64_t blocks, uint8_t* panel) {
  const int parts = 8 / bits, row = width * 4;
  for (int64_t b = 0; b < blocks; ++b)
    for (int part = 0; part < parts; ++part)
      for (int i = 0; i < row; ++i)
        panel[(b * parts + part) * row + i] =
            (uint8_t)(packed[b * row + i] >> (bits * part) & ((1 << bits) - 1));
}

// sums += codes · x of four inputs.
void add_products(const int8_t* x, const uint8_t* panel, int width, int32_t* sums) {
  for (int n = 0; n < width; ++n) {
    const uint8_t* w = panel + n * 4;
    sums[n] += x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
  }
}

// y += scales · (sums + shift · zero) of the first group, and on to the next.
void fold(const int32_t* sums, int width, PackedGroups& group, float* y) {
  for (int n = 0; n < width; ++n) {
    const int32_t zero = group.zeros == nullptr ? 1 : group.zeros[n];
    y[n] = fmaf(group.scales[n], (float)(sums[n] + group.shifts[0] * zero), y[n]);
  }
  group.scales += width;
  if (group.zeros != nullptr) group.zeros += width;
  ++group.shifts;
}

void multiply(const int8_t* q, int64_t q_stride, const uint8_t* panel, int width, int64_t depth,
              int64_t group, int rows, const PackedGroups& groups, float* y) {
  for (int r = 0; r < rows; ++r) {
    PackedGroups now = groups;
    now.shifts += r * groups.shifts_stride;
    for (int64_t start = 0; start < depth; start += group) {
      int32_t sums[kPackedPanel] = {};
      for (int64_t k = start; k < depth && k < start + group; k += 4)
        add_products(q + r * q_stride + k, panel + k * width, width, sums);
      fold(sums, width, now, y + r * width);
    }
  }
}

void multiply_packed(int bits, const int8_t* q, int64_t q_stride, const uint8_t* packed, int width,
                     int64_t depth, int64_t group, int rows, const PackedGroups& groups, float* y) {
  const int64_t block = 32 / bits;
  // So many inputs at a time are unpacked, of the same group.
  uint8_t panel[16 * kPackedPanel];
  for (int r = 0; r < rows; ++r) {
    PackedGroups now = groups;
    now.shifts += r * groups.shifts_stride;
    for (int64_t start = 0; start < depth; start += group) {
      int32_t sums[kPackedPanel] = {};
      for (int64_t k = start; k < depth && k < start + group; k += block) {
        unpack(bits, packed + k / block * width * 4, width, 1, panel);
        for (int64_t j = 0; j < block; j += 4)
          add_products(q + r * q_stride + k + j, panel + j * width, width, sums);
      }
      fold(sums, width, now, y + r * width);
    }
  }
}

}  // namespace

const PackedProducts& packed_products_baseline() {
  static const PackedProducts products = {"baseline", sum_groups, unpack, multiply,
                                          multiply_packed};
  return products;
}

}  // namespace compressops::cpu
