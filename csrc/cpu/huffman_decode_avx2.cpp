#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,popcnt")
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "huffman_decode.h"

namespace compressops::cpu {
namespace {

#include "huffman_bits.h"

// For each of 256 masks: which bytes of 16, eight for bits of 0 and eight for bits of 1, come next.
struct Choices {
  uint8_t of[256][8];
};

constexpr Choices kChoices = [] {
  Choices choices{};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0, taken = 0; i < 8; ++i) {
      const int bit = mask >> i & 1;
      choices.of[mask][i] = (uint8_t)(bit ? 8 + taken : i - taken);
      taken += bit;
    }
  return choices;
}();

inline uint64_t merge_eight(const uint8_t* zeros, const uint8_t* ones, unsigned bits) {
  const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)zeros),
                                          _mm_loadl_epi64((const __m128i*)ones));
  const __m128i choice = _mm_loadl_epi64((const __m128i*)kChoices.of[bits]);
  return (uint64_t)_mm_cvtsi128_si64(_mm_shuffle_epi8(both, choice));
}

#include "huffman_decode_eights.h"

// Of 32 bits, a byte for each: 255 or 0.
inline __m256i spread(uint32_t bits) {
  const __m256i its_byte =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i its_bit = _mm256_set1_epi64x((long long)0x8040201008040201u);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), its_byte);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, its_bit), its_bit);
}

inline void merge_symbols(Bits bits, int64_t n, int zero, int one, uint8_t* out, bool exact) {
  const __m256i zeros = _mm256_set1_epi8((char)zero), ones = _mm256_set1_epi8((char)one);
  for (; n > 0; n -= 64, out += 64, bits.first += 8) {
    const uint64_t word = bits.word(0);
    uint8_t last[64];
    uint8_t* to = exact && n < 64 ? last : out;
    const __m256i low = _mm256_blendv_epi8(zeros, ones, spread((uint32_t)word));
    const __m256i high = _mm256_blendv_epi8(zeros, ones, spread((uint32_t)(word >> 32)));
    _mm256_storeu_si256((__m256i*)to, low);
    _mm256_storeu_si256((__m256i*)(to + 32), high);
    if (to == last) memcpy(out, last, (size_t)n);
  }
}
#include "huffman_decode_loops.h"

}  // namespace

HuffmanFault huffman_decode_avx2(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                 uint8_t* out, int64_t count) {
  return decode_levels(tree, scratch, bytes, out, count);
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
