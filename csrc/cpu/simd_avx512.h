// simd.h for AVX-512. Included inside the anonymous namespace of a translation unit that is
// compiled for it, after <immintrin.h> and <stdint.h> and <string.h>.

constexpr int kLanes = 16;
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

#include "simd.h"
