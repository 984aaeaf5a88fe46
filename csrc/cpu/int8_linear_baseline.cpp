#include "int8_linear.h"

namespace compressops::cpu {
namespace {

void multiply(const Int8Block& block) {
  const int64_t panel_size = block.k_blocks * kColumns * kDepth;
  for (int m = 0; m < block.count; ++m) {
    const RowScale row = block.rows[m];
    for (int64_t n = 0; n < block.columns; ++n) {
      const uint8_t* x = block.q + m * block.q_stride;
      const int8_t* w = block.panels + n / kColumns * panel_size + n % kColumns * kDepth;
      // Unsigned, because the shift of q may carry a sum past 2^31; it is undone modulo 2^32.
      uint32_t sum = -(uint32_t)row.zero * (uint32_t)block.weight_sums[n];
      for (int64_t b = 0; b < block.k_blocks; ++b, x += kDepth, w += kColumns * kDepth)
        sum += (uint32_t)(x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3]);
      float value = (float)(int32_t)sum * (row.scale * block.scales[n]);
      if (block.bias != nullptr) value += block.bias[n];
      block.y[m * block.y_stride + n] = block.relu && value < 0.0f ? 0.0f : value;  // keeps NaN
    }
  }
}

}  // namespace

const Int8LinearKernels& int8_linear_baseline() {
  static const Int8LinearKernels kernels = {"baseline", multiply};
  return kernels;
}

}  // namespace compressops::cpu
