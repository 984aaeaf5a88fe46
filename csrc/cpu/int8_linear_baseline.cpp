#include <string.h>

#include "int8_linear.h"

namespace compressops::cpu {
namespace {

void multiply(const uint8_t* q, int64_t q_stride, const int8_t* panels_start, int64_t k_blocks,
              int rows, int panels, int32_t* accumulators) {
  const int64_t panel_stride = k_blocks * kColumns * kDepth;
  for (int m = 0; m < rows; ++m) {
    for (int p = 0; p < panels; ++p) {
      // Unsigned, because the shift of q by 128 may carry a sum past 2^31; it is undone modulo
      // 2^32.
      uint32_t sums[kColumns] = {};
      const int8_t* weight = panels_start + p * panel_stride;
      for (int64_t b = 0; b < k_blocks; ++b, weight += kColumns * kDepth) {
        const uint8_t* x = q + m * q_stride + b * kDepth;
        for (int n = 0; n < kColumns; ++n) {
          const int8_t* w = weight + n * kDepth;
          sums[n] += (uint32_t)(x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3]);
        }
      }
      memcpy(accumulators + (m * panels + p) * kColumns, sums, sizeof(sums));
    }
  }
}

void finish(const int32_t* sums, int64_t columns, const Int8Row& row, const int32_t* weight_sums,
            const float* scales, const float* bias, bool relu, float* y) {
  for (int64_t n = 0; n < columns; ++n) {
    // Unsigned arithmetic may wrap.
    const int32_t exact =
        (int32_t)((uint32_t)sums[n] - (uint32_t)row.x_zero * (uint32_t)weight_sums[n]);
    float value = (float)exact * (row.x_scale * scales[n]);
    if (bias != nullptr) value += bias[n];
    y[n] = relu && value < 0.0f ? 0.0f : value;  // keeps NaN
  }
}

}  // namespace

const Int8LinearKernels& int8_linear_baseline() {
  static const Int8LinearKernels kernels = {"baseline", multiply, finish};
  return kernels;
}

}  // namespace compressops::cpu
