#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <string.h>

#include "winograd_conv2d.h"

namespace compressops::cpu {
namespace {

constexpr int kLanes = 16;
// 12 × 2 sums, 2 vectors of weights and a broadcast value fill the 32 registers.
constexpr int kRegisterRows = 12;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));

inline Vec widen(Short bits) { return (Vec)_mm512_cvtph_ps((__m256i)bits); }
inline Short narrow(Vec value) {
  return (Short)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
}
inline __mmask16 first(int64_t count) { return (__mmask16)((1u << count) - 1); }
inline Vec load_first(const float* from, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(first(count), from);
}
inline void store_first(float* to, int64_t count, Vec value) {
  _mm512_mask_storeu_ps(to, first(count), (__m512)value);
}

#include "winograd_conv2d_simd.h"

}  // namespace

const WinogradConv2dKernels& winograd_conv2d_avx512() {
  static constexpr WinogradConv2dKernels instance = kernels("avx512");
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
