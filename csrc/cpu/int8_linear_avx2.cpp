#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>

#include "int8_linear.h"

namespace compressops::cpu {
namespace {

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

void finish(const int32_t* sums, const Int8Block& block, int m) {
  const RowScale row = block.rows[m];
  const __m256i zero = _mm256_set1_epi32(row.zero);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 x_scale = _mm256_set1_ps(row.scale), none = _mm256_setzero_ps();
  float* y = block.y + m * block.y_stride;
  for (int64_t n = 0; n < block.columns; n += 8) {
    const int64_t rest = block.columns - n;
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(rest < 8 ? rest : 8)), lane);
    const __m256i weight_sums = _mm256_maskload_epi32(block.weight_sums + n, lanes);
    const __m256i exact = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i*)(sums + n)),
                                           _mm256_mullo_epi32(zero, weight_sums));
    const __m256 scale = _mm256_mul_ps(x_scale, _mm256_maskload_ps(block.scales + n, lanes));
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(exact), scale);
    if (block.bias != nullptr)
      value = _mm256_add_ps(value, _mm256_maskload_ps(block.bias + n, lanes));
    // Not max, which would lose NaN.
    if (block.relu) value = _mm256_andnot_ps(_mm256_cmp_ps(value, none, _CMP_LT_OQ), value);
    _mm256_maskstore_ps(y + n, lanes, value);
  }
}

void multiply(const Int8Block& block) {
  alignas(32) int32_t sums[2 * kTile.panels * kColumns];
  const int64_t stride = block.panel_count * kColumns;
  for (int m = 0; m < block.count; m += 2) {
    const uint8_t* q = block.q + m * block.q_stride;
    const bool two = m + 1 < block.count;
    for (int p = 0; p < block.panel_count; ++p)
      (two ? multiply_rows<2>
           : multiply_rows<1>)(q, block.q_stride,
                               block.panels + p * block.k_blocks * kColumns * kDepth,
                               block.k_blocks, sums + p * kColumns, stride);
    finish(sums, block, m);
    if (two) finish(sums + stride, block, m + 1);
  }
}

}  // namespace

const Int8LinearKernels& int8_linear_avx2() {
  static const Int8LinearKernels kernels = {"avx2", multiply};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
