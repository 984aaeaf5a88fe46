#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include <immintrin.h>
#include <string.h>

#include "pack_panels.h"

namespace compressops::cpu {
namespace {

struct Vec {
  static constexpr int kWords = 8;
  __m256i v;

  static Vec load(const int8_t* at) { return {_mm256_loadu_si256((const __m256i*)at)}; }
  static Vec bytes(uint8_t value) { return {_mm256_set1_epi8((char)value)}; }
  void store(void* at) const { _mm256_storeu_si256((__m256i*)at, v); }
  Vec operator|(Vec other) const { return {_mm256_or_si256(v, other.v)}; }
  Vec operator&(Vec other) const { return {_mm256_and_si256(v, other.v)}; }
  Vec plus_bytes(Vec other) const { return {_mm256_add_epi8(v, other.v)}; }
  Vec shifted_right64(int bits) const { return {_mm256_srli_epi64(v, bits)}; }
  static Vec even_words(Vec a, Vec b) {
    // Within quarters, then the quarters.
    const __m256i even =
        (__m256i)_mm256_shuffle_ps((__m256)a.v, (__m256)b.v, _MM_SHUFFLE(2, 0, 2, 0));
    return {_mm256_permute4x64_epi64(even, _MM_SHUFFLE(3, 1, 2, 0))};
  }
  static Vec lo32(Vec a, Vec b) { return {_mm256_unpacklo_epi32(a.v, b.v)}; }
  static Vec hi32(Vec a, Vec b) { return {_mm256_unpackhi_epi32(a.v, b.v)}; }
  static Vec lo64(Vec a, Vec b) { return {_mm256_unpacklo_epi64(a.v, b.v)}; }
  static Vec hi64(Vec a, Vec b) { return {_mm256_unpackhi_epi64(a.v, b.v)}; }
  // The quarters q of two vectors to out[4 q].
  static void lanes(const Vec* in, Vec* out) {
    out[0].v = _mm256_permute2x128_si256(in[0].v, in[1].v, 0x20);
    out[4].v = _mm256_permute2x128_si256(in[0].v, in[1].v, 0x31);
  }
  Vec sum_bytes(Vec words) const {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), words.v);
    return {_mm256_add_epi32(v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
};

#include "pack_panels_loops.h"

}  // namespace

const PackPanelsKernels& pack_panels_avx2() { return kKernels; }

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
