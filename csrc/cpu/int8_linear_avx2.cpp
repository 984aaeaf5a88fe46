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

#include "int8_linear.h"

namespace compressops::cpu {
namespace {

// All ones in the first `rest` lanes.
__m256i tail_mask(int64_t rest) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)rest),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

float quantize_row(const float* x, uint8_t* q, int64_t K) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)(x + k));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, magnitude));
  }
  if (k < K) {
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
  for (k = 0; k < K; k += 8) {
    const __m256i mask = tail_mask(K - k);
    __m256 scaled =
        finite ? _mm256_mul_ps(_mm256_maskload_ps(x + k, mask), scale) : _mm256_setzero_ps();
    // 0 · Inf, where amax is subnormal, is NaN: zero it as the other kernels do.
    scaled = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
    scaled = _mm256_max_ps(low, _mm256_min_ps(high, scaled));
    const __m256i codes = _mm256_add_epi32(_mm256_cvtps_epi32(scaled), _mm256_set1_epi32(128));
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    const int64_t count = K - k;
    if (count >= 8) {
      _mm_storel_epi64((__m128i*)(q + k), bytes);
    } else {
      // Lanes past K hold 128 already, and q has room up to the next multiple of kDepth.
      alignas(16) uint8_t rest[16];
      _mm_store_si128((__m128i*)rest, bytes);
      const int64_t padded = (count + kDepth - 1) / kDepth * kDepth;
      for (int64_t i = 0; i < padded; ++i) q[k + i] = rest[i];
    }
  }
  return finite ? amax / 127.0f : NAN;
}

// vpmaddubsw would saturate at u8 × s8 pairs, so both sides are widened to 16 bits.
template <int Rows>
void multiply_rows(const uint8_t* q, int64_t q_stride, const int8_t* weight, int64_t k_blocks,
                   int32_t* accumulators, int64_t stride) {
  __m256i sums[Rows][4];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm256_setzero_si256();
  for (int64_t b = 0; b < k_blocks; ++b, weight += kColumns * kDepth) {
    __m256i w[4];
    for (int i = 0; i < 4; ++i)
      w[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(weight + 16 * i)));
    for (int m = 0; m < Rows; ++m) {
      const __m128i four = _mm_loadu_si32(q + m * q_stride + b * kDepth);
      const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(four));
      for (int i = 0; i < 4; ++i)
        sums[m][i] = _mm256_add_epi32(sums[m][i], _mm256_madd_epi16(x, w[i]));
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int i = 0; i < 4; ++i) {
      // Each column's sum is in two neighbouring lanes.
      const __m256i pairs = _mm256_hadd_epi32(sums[m][i], sums[m][i]);
      const __m128i columns =
          _mm_unpacklo_epi64(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      _mm_storeu_si128((__m128i*)(accumulators + m * stride + 4 * i), columns);
    }
  }
}

void multiply(const uint8_t* q, int64_t q_stride, const int8_t* panels_start, int64_t k_blocks,
              int rows, int panels, int32_t* accumulators) {
  const int64_t stride = panels * kColumns;
  for (int p = 0; p < panels; ++p) {
    const int8_t* weight = panels_start + p * k_blocks * kColumns * kDepth;
    int m = 0;
    for (; m + 2 <= rows; m += 2)
      multiply_rows<2>(q + m * q_stride, q_stride, weight, k_blocks,
                       accumulators + m * stride + p * kColumns, stride);
    if (m < rows)
      multiply_rows<1>(q + m * q_stride, q_stride, weight, k_blocks,
                       accumulators + m * stride + p * kColumns, stride);
  }
}

}  // namespace

const Int8LinearKernels& int8_linear_avx2() {
  static const Int8LinearKernels kernels = {"avx2", quantize_row, multiply};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
