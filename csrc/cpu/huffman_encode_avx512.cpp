#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(                                                       \
    __attribute__((target("bmi2,popcnt,avx512f,avx512bw,avx512vbmi,avx512vbmi2"))), \
    apply_to = function)
#else
#pragma GCC target("bmi2,popcnt,avx512f,avx512bw,avx512vbmi,avx512vbmi2")
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "huffman_encode.h"

namespace compressops::cpu {
namespace {

#include "huffman_bits.h"

inline void to_ranks(const HuffmanCode& code, const uint8_t* symbols, int64_t n, uint8_t* ranks) {
  __m512i table[4];
  for (int k = 0; k < 4; ++k) table[k] = _mm512_loadu_si512(code.rank + 64 * k);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 there = (__mmask64)low_bits(~uint64_t{0}, n - i);
    const __m512i from = _mm512_maskz_loadu_epi8(there, symbols + i);
    const __m512i low = _mm512_permutex2var_epi8(table[0], from, table[1]);
    const __m512i high = _mm512_permutex2var_epi8(table[2], from, table[3]);
    _mm512_storeu_si512(ranks + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(from), low, high));
  }
}

inline uint64_t marks(const uint8_t* ranks, int limit) {
  return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(ranks), _mm512_set1_epi8((char)limit));
}

// Into a register: vpcompressb to memory takes more than a hundred cycles on Zen 4.
template <bool kOnes>
inline void keep(const uint8_t* ranks, int64_t n, int limit, uint8_t* out) {
  for (int64_t i = 0; i < n; i += 64) {
    const uint64_t marked = marks(ranks + i, limit), word = kOnes ? marked : ~marked;
    const __m512i there = _mm512_loadu_si512(ranks + i);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi8((__mmask64)word, there));
    out += __builtin_popcountll(word);
  }
}

#include "huffman_encode_loops.h"

}  // namespace

void huffman_encode_avx512(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                           const uint8_t* symbols, int64_t count, uint8_t* out) {
  encode_levels(code, scratch, symbols, count, out);
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
