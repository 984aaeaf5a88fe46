#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "quantize_row.h"

namespace compressops::cpu {
namespace {

__mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

RowRange range(const float* x, int64_t K, bool low_and_high) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest[2] = {};
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  int64_t k = 0;
  if (low_and_high) {
    for (; k < K; k += 16) {
      const __m512 values = _mm512_maskz_loadu_ps(first_lanes(K - k), x + k);
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(values), magnitude);
      largest[0] = _mm512_max_epu32(largest[0], bits);
      low = _mm512_min_ps(low, values);
      high = _mm512_max_ps(high, values);
    }
  }
  for (; k + 32 <= K; k += 32)
    for (int i = 0; i < 2; ++i)
      largest[i] = _mm512_max_epu32(
          largest[i], _mm512_and_si512(_mm512_loadu_si512(x + k + 16 * i), magnitude));
  for (; k < K; k += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(K - k), x + k);
    largest[0] = _mm512_max_epu32(largest[0], _mm512_and_si512(bits, magnitude));
  }
  const uint32_t top = _mm512_reduce_max_epu32(_mm512_max_epu32(largest[0], largest[1]));
  if (!low_and_high) return {top, 0.0f, 0.0f};
  return {top, _mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

void codes(const float* x, uint8_t* q, int64_t K, int64_t padded, const RowCodes& how) {
  const __m512 scale = _mm512_set1_ps(how.inverse);
  const __m512 high = _mm512_set1_ps(how.most);
  const __m512 low = _mm512_set1_ps(how.least);
  const __m512i zero = _mm512_set1_epi32(how.zero);
  int64_t k = 0;
  // By a row's own largest magnitude nothing is clipped, and with a finite factor nothing is NaN:
  // less than half of the time.
  if (how.finite && how.least == -127.0f && how.most == 127.0f && how.inverse < INFINITY) {
    // Packs put the parts of 16 bytes of their operands side by side: what of which vector is
    // where, by words of 4 bytes.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i zeros = _mm512_set1_epi8((char)how.zero);
    for (; k + 64 <= K; k += 64) {
      __m512i words[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        words[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k + 16 * i), scale));
      const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(words[0], words[1]),
                                               _mm512_packs_epi32(words[2], words[3]));
      _mm512_storeu_si512(q + k, _mm512_add_epi8(_mm512_permutexvar_epi32(order, bytes), zeros));
    }
    for (; k + 16 <= K; k += 16) {
      const __m512i words = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), scale));
      _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtepi32_epi8(_mm512_add_epi32(words, zero)));
    }
  }
  for (; k < K; k += 16) {
    const __mmask16 lanes = how.finite ? first_lanes(K - k) : (__mmask16)0;
    __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), scale);
    // 0 · Inf, where the scale is subnormal, is NaN: zero it as the other kernels do.
    scaled = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q), scaled);
    scaled = _mm512_max_ps(low, _mm512_min_ps(high, scaled));
    const __m512i words = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), zero);
    _mm_mask_storeu_epi8(q + k, first_lanes(K - k), _mm512_cvtepi32_epi8(words));
  }
  memset(q + K, how.zero, padded - K);
}

void values(const float* x, float* y, int64_t K, const RowCodes& how, float scale, float largest) {
  const __m512 most = _mm512_set1_ps(largest), least = _mm512_set1_ps(-largest);
  const __m512 inverse = _mm512_set1_ps(how.inverse), scales = _mm512_set1_ps(scale);
  const __m512 high = _mm512_set1_ps(how.most), low = _mm512_set1_ps(how.least);
  for (int64_t k = 0; k < K; k += 16) {
    const __mmask16 lanes = first_lanes(K - k);
    const __m512 loaded = _mm512_maskz_loadu_ps(how.finite ? lanes : (__mmask16)0, x + k);
    __m512 scaled = _mm512_mul_ps(loaded, inverse);
    scaled = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q), scaled);
    scaled = _mm512_max_ps(low, _mm512_min_ps(high, scaled));
    const __m512 whole =
        _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // -0 + 0 is 0.
    __m512 rounded = _mm512_mul_ps(_mm512_add_ps(whole, _mm512_setzero_ps()), scales);
    // Of NaN and a number these give the second.
    rounded = _mm512_max_ps(least, _mm512_min_ps(most, rounded));
    _mm512_mask_storeu_ps(y + k, lanes, rounded);
  }
}

}  // namespace

const QuantizeRowKernels& quantize_row_avx512() {
  static const QuantizeRowKernels kernels = {range, codes, values};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
