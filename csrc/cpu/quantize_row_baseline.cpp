#include <math.h>
#include <string.h>

#include "quantize_row.h"

namespace compressops::cpu {
namespace {

RowRange range(const float* x, int64_t K, bool) {
  RowRange out = {0, 0.0f, 0.0f};
  for (int64_t k = 0; k < K; ++k) {
    uint32_t bits;
    memcpy(&bits, x + k, sizeof(bits));
    bits &= 0x7fffffffu;
    out.top = bits > out.top ? bits : out.top;
    out.low = x[k] < out.low ? x[k] : out.low;
    out.high = x[k] > out.high ? x[k] : out.high;
  }
  return out;
}

void codes(const float* x, uint8_t* q, int64_t K, int64_t padded, const RowCodes& how) {
  for (int64_t k = 0; k < K; ++k) {
    // The inverse is Inf where the scale is subnormal; the clip comes before the conversion.
    float scaled = how.finite ? x[k] * how.inverse : 0.0f;
    scaled = scaled < how.least ? how.least : scaled > how.most ? how.most : scaled;
    q[k] = (uint8_t)(how.zero + (scaled == scaled ? (int)nearbyintf(scaled) : 0));
  }
  memset(q + K, how.zero, padded - K);
}

void values(const float* x, float* y, int64_t K, const RowCodes& how, float scale, float largest) {
  for (int64_t k = 0; k < K; ++k) {
    float scaled = how.finite ? x[k] * how.inverse : 0.0f;
    scaled = scaled < how.least ? how.least : scaled > how.most ? how.most : scaled;
    const float rounded = (scaled == scaled ? nearbyintf(scaled) + 0.0f : 0.0f) * scale;
    y[k] = rounded > largest ? largest : rounded < -largest ? -largest : rounded;  // NaN stays
  }
}

}  // namespace

const QuantizeRowKernels& quantize_row_baseline() {
  static const QuantizeRowKernels kernels = {range, codes, values};
  return kernels;
}

}  // namespace compressops::cpu
