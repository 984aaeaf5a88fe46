// simd.h for AVX2. Included inside the anonymous namespace of a translation unit that is
// compiled for it, after <immintrin.h> and <stdint.h> and <string.h>.

constexpr int kLanes = 8;
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

#include "simd.h"
