#include "quantize_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu_features.h"

namespace compressops::cpu {
namespace {

const QuantizeRowKernels& kernels() {
#if defined(__x86_64__)
  if (features().avx512) return quantize_row_avx512();
  if (features().avx2) return quantize_row_avx2();
#endif
  return quantize_row_baseline();
}

RowScale quantize(const float* x, uint8_t* q, int64_t K, int64_t padded, const Quantization& how) {
  const QuantizeRowKernels& isa = kernels();
  float scale;
  const RowCodes codes =
      row_codes(isa.range(x, K, how.kind == Quantization::kAsymmetric), how, &scale);
  isa.codes(x, q, K, padded, codes);
  return {scale, codes.zero};
}

void round(const float* x, float* y, int64_t K, const Quantization& how) {
  const QuantizeRowKernels& isa = kernels();
  float scale;
  const RowCodes codes =
      row_codes(isa.range(x, K, how.kind == Quantization::kAsymmetric), how, &scale);
  isa.values(x, y, K, codes, scale, how.largest);
}

}  // namespace

RowCodes row_codes(const RowRange& range, const Quantization& how, float* scale) {
  RowCodes codes{0.0f, -127.0f, 127.0f, 0, range.top < 0x7f800000u};
  *scale = NAN;
  if (codes.finite) {
    switch (how.kind) {
      case Quantization::kSymmetric: {
        float amax;
        std::memcpy(&amax, &range.top, sizeof(amax));
        codes.inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
        *scale = amax / 127.0f;
        break;
      }
      case Quantization::kAsymmetric: {
        // Halved, so that the difference of two large values stays finite.
        const float half = range.high * 0.5f - range.low * 0.5f;
        codes.inverse = half > 0.0f ? 127.5f / half : 0.0f;
        *scale = half / 127.5f;
        const float lowest = range.low * codes.inverse;  // 0 · Inf counts as 0
        codes.zero = -128 - (int)std::nearbyint(lowest < 0.0f ? std::max(lowest, -255.0f) : 0.0f);
        break;
      }
      case Quantization::kStatic:
        codes.inverse = 1.0f / how.scale;
        *scale = how.scale;
        codes.zero = how.zero;
    }
    if (how.kind != Quantization::kSymmetric) {
      codes.least = -128.0f - (float)codes.zero;
      codes.most = 127.0f - (float)codes.zero;
    }
  }
  codes.zero += how.offset;
  return codes;
}

QuantizeRow quantize_row() { return quantize; }

RoundRow round_row() { return round; }

}  // namespace compressops::cpu
