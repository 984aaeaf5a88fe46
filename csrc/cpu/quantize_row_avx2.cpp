#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>
#include <string.h>

#include "quantize_row.h"

namespace compressops::cpu {
namespace {

// All ones in the first `rest` lanes.
__m256i tail_mask(int64_t rest) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(rest < 8 ? rest : 8)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

float lowest(__m256 values) {
  __m128 four = _mm_min_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  four = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(four, _mm_shuffle_ps(four, four, 1)));
}

RowRange range(const float* x, int64_t K, bool) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256i largest = _mm256_setzero_si256();
  // Of x and of -x.
  __m256 least = _mm256_setzero_ps(), least_negated = _mm256_setzero_ps();
  for (int64_t k = 0; k < K; k += 8) {
    const __m256i bits = _mm256_maskload_epi32((const int*)(x + k), tail_mask(K - k));
    const __m256 values = _mm256_castsi256_ps(bits);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, magnitude));
    least = _mm256_min_ps(least, values);
    least_negated = _mm256_min_ps(least_negated, _mm256_xor_ps(values, sign));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256((__m256i*)lanes, largest);
  uint32_t top = 0;
  for (uint32_t lane : lanes) top = lane > top ? lane : top;
  return {top, lowest(least), -lowest(least_negated)};
}

void codes(const float* x, uint8_t* q, int64_t K, int64_t padded, const RowCodes& how) {
  const __m256 scale = _mm256_set1_ps(how.inverse);
  const __m256 high = _mm256_set1_ps(how.most);
  const __m256 low = _mm256_set1_ps(how.least);
  const __m256i zero = _mm256_set1_epi32(how.zero);
  // Of each half the lowest byte of its four words.
  const __m256i bytes =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int64_t k = 0; k < K; k += 8) {
    __m256 scaled = how.finite ? _mm256_mul_ps(_mm256_maskload_ps(x + k, tail_mask(K - k)), scale)
                               : _mm256_setzero_ps();
    // 0 · Inf, where the scale is subnormal, is NaN: zero it as the other kernels do.
    scaled = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
    scaled = _mm256_max_ps(low, _mm256_min_ps(high, scaled));
    const __m256i words =
        _mm256_shuffle_epi8(_mm256_add_epi32(_mm256_cvtps_epi32(scaled), zero), bytes);
    const __m128i eight =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    alignas(16) uint8_t stored[16];
    _mm_store_si128((__m128i*)stored, eight);
    memcpy(q + k, stored, K - k < 8 ? K - k : 8);
  }
  memset(q + K, how.zero, padded - K);
}

void values(const float* x, float* y, int64_t K, const RowCodes& how, float scale, float largest) {
  const __m256 most = _mm256_set1_ps(largest), least = _mm256_set1_ps(-largest);
  const __m256 inverse = _mm256_set1_ps(how.inverse), scales = _mm256_set1_ps(scale);
  const __m256 high = _mm256_set1_ps(how.most), low = _mm256_set1_ps(how.least);
  for (int64_t k = 0; k < K; k += 8) {
    const __m256i lanes = tail_mask(K - k);
    __m256 scaled =
        how.finite ? _mm256_mul_ps(_mm256_maskload_ps(x + k, lanes), inverse) : _mm256_setzero_ps();
    scaled = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
    scaled = _mm256_max_ps(low, _mm256_min_ps(high, scaled));
    const __m256 whole = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // -0 + 0 is 0.
    __m256 rounded = _mm256_mul_ps(_mm256_add_ps(whole, _mm256_setzero_ps()), scales);
    // Of NaN and a number these give the second.
    rounded = _mm256_max_ps(least, _mm256_min_ps(most, rounded));
    _mm256_maskstore_ps(y + k, lanes, rounded);
  }
}

}  // namespace

const QuantizeRowKernels& quantize_row_avx2() {
  static const QuantizeRowKernels kernels = {range, codes, values};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
