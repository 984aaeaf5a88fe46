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
#include <string.h>

#include "pack_panels.h"

namespace compressops::cpu {
namespace {

struct Vec {
  static constexpr int kWords = 16;
  __m512i v;

  static Vec load(const int8_t* at) { return {_mm512_loadu_si512(at)}; }
  static Vec bytes(uint8_t value) { return {_mm512_set1_epi8((char)value)}; }
  void store(void* at) const { _mm512_storeu_si512(at, v); }
  Vec operator|(Vec other) const { return {_mm512_or_si512(v, other.v)}; }
  Vec operator&(Vec other) const { return {_mm512_and_si512(v, other.v)}; }
  Vec plus_bytes(Vec other) const { return {_mm512_add_epi8(v, other.v)}; }
  Vec shifted_right64(unsigned bits) const { return {_mm512_srli_epi64(v, bits)}; }
  static Vec even_words(Vec a, Vec b) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_epi32(a.v, even, b.v)};
  }
  static Vec lo32(Vec a, Vec b) { return {_mm512_unpacklo_epi32(a.v, b.v)}; }
  static Vec hi32(Vec a, Vec b) { return {_mm512_unpackhi_epi32(a.v, b.v)}; }
  static Vec lo64(Vec a, Vec b) { return {_mm512_unpacklo_epi64(a.v, b.v)}; }
  static Vec hi64(Vec a, Vec b) { return {_mm512_unpackhi_epi64(a.v, b.v)}; }
  // The quarters q of four vectors to out[4 q].
  static void lanes(const Vec* in, Vec* out) {
    const __m512i a = _mm512_shuffle_i32x4(in[0].v, in[1].v, 0x44);  // 0 1 of each
    const __m512i b = _mm512_shuffle_i32x4(in[0].v, in[1].v, 0xee);  // 2 3 of each
    const __m512i c = _mm512_shuffle_i32x4(in[2].v, in[3].v, 0x44);
    const __m512i d = _mm512_shuffle_i32x4(in[2].v, in[3].v, 0xee);
    out[0].v = _mm512_shuffle_i32x4(a, c, 0x88);
    out[4].v = _mm512_shuffle_i32x4(a, c, 0xdd);
    out[8].v = _mm512_shuffle_i32x4(b, d, 0x88);
    out[12].v = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  Vec sum_bytes(Vec words) const {
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi8(1), words.v);
    return {_mm512_add_epi32(v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
};

#include "pack_panels_loops.h"

}  // namespace

const PackPanelsKernels& pack_panels_avx512() { return kKernels; }

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
