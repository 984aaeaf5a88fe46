#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "quantize_row.h"

namespace compressops::cpu {
namespace {

// All ones in the first `rest` lanes.
__m256i tail_mask(int64_t rest) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(rest < 8 ? rest : 8)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

}  // namespace

float quantize_row_avx2(const float* x, uint8_t* q, int64_t K, int64_t padded, int offset) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t k = 0; k < K; k += 8) {
    const __m256i bits = _mm256_maskload_epi32((const int*)(x + k), tail_mask(K - k));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256((__m256i*)lanes, largest);
  uint32_t top = 0;
  for (uint32_t lane : lanes) top = lane > top ? lane : top;
  const bool finite = top < 0x7f800000u;
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)top)));
  const float inverse = finite && amax > 0.0f ? 127.0f / amax : 0.0f;

  const __m256 scale = _mm256_set1_ps(inverse);
  const __m256 high = _mm256_set1_ps(127.0f);
  const __m256 low = _mm256_set1_ps(-127.0f);
  const __m128i shift = _mm_set1_epi8((char)offset);
  for (int64_t k = 0; k < K; k += 8) {
    __m256 scaled = finite ? _mm256_mul_ps(_mm256_maskload_ps(x + k, tail_mask(K - k)), scale)
                           : _mm256_setzero_ps();
    // 0 · Inf, where amax is subnormal, is NaN: zero it as the other kernels do.
    scaled = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
    scaled = _mm256_max_ps(low, _mm256_min_ps(high, scaled));
    const __m256i codes = _mm256_cvtps_epi32(scaled);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    alignas(16) uint8_t bytes[16];
    _mm_store_si128((__m128i*)bytes, _mm_add_epi8(_mm_packs_epi16(words, words), shift));
    memcpy(q + k, bytes, K - k < 8 ? K - k : 8);
  }
  memset(q + K, offset, padded - K);
  return finite ? amax / 127.0f : NAN;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
