#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>
#include <string.h>

#include "bsr_linear.h"

namespace compressops::cpu {
namespace {

// 3 × 2 sums: each product needs registers of its own.
constexpr int kMostRows = 3;
constexpr int kNarrowRows = 2;
constexpr bool kIntegers = true;

#include "simd_avx2.h"

// vpmaddubsw would saturate at u8 × s8 pairs, so the even and the odd bytes are widened to 16 bits.
inline Vec add_products(Vec sums, Vec x, Vec weights) {
  const __m256i codes = (__m256i)x, w = (__m256i)weights;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(w, 8));
  return (Vec)_mm256_add_epi32((__m256i)sums, _mm256_add_epi32(even, odd));
}
inline Vec add_sums(Vec a, Vec b) { return (Vec)((Bits)a + (Bits)b); }

#include "bsr_int8_linear_simd.h"
#include "bsr_linear_simd.h"

}  // namespace

const BsrLinearKernels& bsr_int8_linear_avx2() {
  static constexpr BsrLinearKernels instance = kernels("avx2", scale);
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
