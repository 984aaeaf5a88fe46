#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "merge_planes.h"

namespace compressops::cpu {
namespace {

struct Vec {
  static constexpr int64_t kBytes = 64;
  __m512i v;

  static Vec load(const uint8_t* at) { return {_mm512_loadu_si512(at)}; }
  void store(void* at) const { _mm512_storeu_si512(at, v); }
  void stream(void* at) const { _mm512_stream_si512((__m512i*)at, v); }
  static void stream_end() { _mm_sfence(); }
  Vec spread_by_two() const {
    return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), v)};
  }
  Vec spread_by_four() const {
    return {_mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v)};
  }
  static Vec lo8(Vec a, Vec b) { return {_mm512_unpacklo_epi8(a.v, b.v)}; }
  static Vec hi8(Vec a, Vec b) { return {_mm512_unpackhi_epi8(a.v, b.v)}; }
  static Vec lo16(Vec a, Vec b) { return {_mm512_unpacklo_epi16(a.v, b.v)}; }
  static Vec hi16(Vec a, Vec b) { return {_mm512_unpackhi_epi16(a.v, b.v)}; }
  Vec turn_back16() const {
    return {_mm512_or_si512(_mm512_srli_epi16(v, 1), _mm512_slli_epi16(v, 15))};
  }
  Vec turn_back32() const { return {_mm512_ror_epi32(v, 1)}; }
};

#include "merge_planes_loops.h"

}  // namespace

const MergePlanesKernels& merge_planes_avx512() {
  static const MergePlanesKernels kernels = {two, four};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
