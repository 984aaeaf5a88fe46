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

#include "winograd_conv2d.h"

namespace compressops::cpu {
namespace {

constexpr int kLanes = 8;
// 6 × 2 sums, 2 vectors of weights and a broadcast value fill the 16 registers.
constexpr int kRegisterRows = 6;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));

inline Vec widen(Short bits) { return (Vec)_mm256_cvtph_ps((__m128i)bits); }
inline Short narrow(Vec value) {
  return (Short)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}
inline __m256i first(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* from, int64_t count) {
  return (Vec)_mm256_maskload_ps(from, first(count));
}
inline void store_first(float* to, int64_t count, Vec value) {
  _mm256_maskstore_ps(to, first(count), (__m256)value);
}

#include "winograd_conv2d_simd.h"

}  // namespace

const WinogradConv2dKernels& winograd_conv2d_avx2() {
  static constexpr WinogradConv2dKernels instance = kernels("avx2");
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
