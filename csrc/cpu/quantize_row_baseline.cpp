#include <math.h>
#include <string.h>

#include "quantize_row.h"

namespace compressops::cpu {

float quantize_row_baseline(const float* x, uint8_t* q, int64_t K, int64_t padded, int offset) {
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
    q[k] = (uint8_t)(offset + (scaled == scaled ? (int)nearbyintf(scaled) : 0));
  }
  memset(q + K, offset, padded - K);
  return finite ? amax / 127.0f : NAN;
}

}  // namespace compressops::cpu
