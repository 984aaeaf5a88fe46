#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include <immintrin.h>

#include "merge_planes.h"

namespace compressops::cpu {
namespace {

struct Vec {
  static constexpr int64_t kBytes = 32;
  __m256i v;

  static Vec load(const uint8_t* at) { return {_mm256_loadu_si256((const __m256i*)at)}; }
  void store(void* at) const { _mm256_storeu_si256((__m256i*)at, v); }
  void stream(void* at) const { _mm256_stream_si256((__m256i*)at, v); }
  static void stream_end() { _mm_sfence(); }
  Vec spread_by_two() const { return {_mm256_permute4x64_epi64(v, 0xd8)}; }
  Vec spread_by_four() const {
    return {_mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7))};
  }
  static Vec lo8(Vec a, Vec b) { return {_mm256_unpacklo_epi8(a.v, b.v)}; }
  static Vec hi8(Vec a, Vec b) { return {_mm256_unpackhi_epi8(a.v, b.v)}; }
  static Vec lo16(Vec a, Vec b) { return {_mm256_unpacklo_epi16(a.v, b.v)}; }
  static Vec hi16(Vec a, Vec b) { return {_mm256_unpackhi_epi16(a.v, b.v)}; }
  Vec turn_back16() const {
    return {_mm256_or_si256(_mm256_srli_epi16(v, 1), _mm256_slli_epi16(v, 15))};
  }
  Vec turn_back32() const {
    return {_mm256_or_si256(_mm256_srli_epi32(v, 1), _mm256_slli_epi32(v, 31))};
  }
};

#include "merge_planes_loops.h"

}  // namespace

const MergePlanesKernels& merge_planes_avx2() {
  static const MergePlanesKernels kernels = {two, four};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
