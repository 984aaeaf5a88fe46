#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>
#include <stdint.h>

#include "int8_conv2d.h"

namespace compressops::cpu {
namespace {

#include "int8_conv2d_loops.h"

// vpmaddubsw would saturate at u8 × s8 pairs, so both sides are widened to 16 bits.
template <int Rows>
void multiply_rows(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
                   const int8_t* weight, int32_t* sums, int64_t sums_stride) {
  __m256i totals[Rows][4];
  for (auto& row : totals)
    for (auto& total : row) total = _mm256_setzero_si256();
  for (int64_t i = 0; i < run_count; ++i) {
    const uint8_t* x[Rows];
    for (int m = 0; m < Rows; ++m) x[m] = pixels[m] + runs[i].offset;
    for (int64_t b = 0; b < runs[i].blocks; ++b, weight += kConvColumns * kConvDepth) {
      __m256i w[4];
      for (int j = 0; j < 4; ++j)
        w[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(weight + 16 * j)));
      for (int m = 0; m < Rows; ++m) {
        const __m128i four = _mm_loadu_si32(x[m] + b * kConvDepth);
        const __m256i codes = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(four));
        for (int j = 0; j < 4; ++j)
          totals[m][j] = _mm256_add_epi32(totals[m][j], _mm256_madd_epi16(codes, w[j]));
      }
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int j = 0; j < 4; ++j) {
      // Each column's sum is in two neighbouring lanes.
      const __m256i pairs = _mm256_hadd_epi32(totals[m][j], totals[m][j]);
      __m128i columns =
          _mm_unpacklo_epi64(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      __m128i* to = (__m128i*)(sums + m * sums_stride + 4 * j);
      _mm_storeu_si128(to, columns);
    }
  }
}

void multiply(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
              const int8_t* weight, int64_t panel_bytes, int rows, int panels, int32_t* sums,
              int64_t sums_stride) {
  for (int p = 0; p < panels; ++p, weight += panel_bytes, sums += kConvColumns) {
    int m = 0;
    for (; m + 2 <= rows; m += 2)
      multiply_rows<2>(pixels + m, runs, run_count, weight, sums + m * sums_stride, sums_stride);
    if (m < rows)
      multiply_rows<1>(pixels + m, runs, run_count, weight, sums + m * sums_stride, sums_stride);
  }
}

}  // namespace

const Int8Conv2dKernels& int8_conv2d_avx2() {
  static constexpr Int8Conv2dKernels kernels = {
      "avx2", range, quantize_planes, quantize_pixels, multiply, multiply_depthwise, finish};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
