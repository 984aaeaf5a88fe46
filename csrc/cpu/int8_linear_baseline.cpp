#include <math.h>
#include <string.h>

#include "int8_linear.h"

namespace compressops::cpu {
namespace {

float quantize_row(const float* x, uint8_t* q, int64_t K) {
  // The largest bit pattern of |x| is the largest |x|, and NaN and Inf are above all numbers.
  uint32_t largest = 0;
  for (int64_t k = 0; k < K; ++k) {
    uint32_t bits;
    memcpy(&bits, x + k, sizeof(bits));
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  float amax;
  memcpy(&amax, &largest, sizeof(amax));
  const bool finite = largest < 0x7f800000u;
  const float inverse = finite && amax > 0.0f ? 127.0f / amax : 0.0f;
  for (int64_t k = 0; k < K; ++k) {
    // 127 / amax overflows to Inf where amax is subnormal; the clamp comes before the conversion.
    float scaled = finite ? x[k] * inverse : 0.0f;
    scaled = scaled < -127.0f ? -127.0f : scaled > 127.0f ? 127.0f : scaled;
    q[k] = scaled == scaled ? (uint8_t)((int)nearbyintf(scaled) + 128) : 128;
  }
  for (int64_t k = K; k % kDepth; ++k) q[k] = 128;
  return finite ? amax / 127.0f : NAN;
}

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

}  // namespace

const Int8LinearKernels& int8_linear_baseline() {
  static const Int8LinearKernels kernels = {"baseline", quantize_row, multiply};
  return kernels;
}

}  // namespace compressops::cpu
