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

inline void merge_symbols(Bits bits, int64_t n, int zero, int one, uint8_t* out,
                          HuffmanStore store) {
  const __m256i zeros = _mm256_set1_epi8((char)zero), ones = _mm256_set1_epi8((char)one);
  for (; n > 0; n -= 64, out += 64, bits.first += 8) {
    const uint64_t word = bits.word(0);
    uint8_t last[64];
    uint8_t* to = store != HuffmanStore::kWhole && n < 64 ? last : out;
    const __m256i low = _mm256_blendv_epi8(zeros, ones, spread((uint32_t)word));
    const __m256i high = _mm256_blendv_epi8(zeros, ones, spread((uint32_t)(word >> 32)));
    _mm256_storeu_si256((__m256i*)to, low);
    _mm256_storeu_si256((__m256i*)(to + 32), high);
    if (to == last) memcpy(out, last, (size_t)n);
  }
}

// 32 numbers of 2 to 6 bits, of which a half takes 2 d bytes. Four of them are shifted to the
// bottom of each lane of 32 bits, and then each to a byte of its own.
struct Numbers {
  __m256i its_bytes, shifts, masks[4];
  __m128i places[3];

  Numbers(int d, unsigned shift) {
    uint32_t first[4], behind[4];
    for (unsigned j = 0; j < 4; ++j) {
      const unsigned bit = shift + 4 * (unsigned)d * j;
      first[j] = bit / 8 * 0x01010101u + 0x03020100u;
      behind[j] = bit % 8;
    }
    its_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)first));
    shifts = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)behind));
    for (int i = 0; i < 4; ++i) masks[i] = _mm256_set1_epi32(((1 << d) - 1) << 8 * i);
    for (int i = 0; i < 3; ++i) places[i] = _mm_cvtsi32_si128((i + 1) * (8 - d));
  }

  __m256i from(const uint8_t* first, int d) const {
    const __m256i bytes =
        _mm256_loadu2_m128i((const __m128i*)(first + 2 * d), (const __m128i*)first);
    const __m256i four = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, its_bytes), shifts);
    __m256i each = _mm256_and_si256(four, masks[0]);
    for (int i = 1; i < 4; ++i)
      each =
          _mm256_or_si256(each, _mm256_and_si256(_mm256_sll_epi32(four, places[i - 1]), masks[i]));
    return each;
  }
};

// vpshufb looks up 16 symbols, and gives 0 for a number whose highest bit is set: what is not among
// the 16 is made such a one.
inline void look_up(Bits bits, int64_t n, int d, const uint8_t* symbols, uint8_t* out,
                    HuffmanStore store) {
  if (d == 1) return merge_symbols(bits, n, symbols[0], symbols[1], out, store);
  if (d > 6) return look_up_each(bits, n, d, symbols, out, store);
  const Numbers numbers(d, bits.shift);
  const int tables = d <= 4 ? 1 : 1 << (d - 4);
  __m256i table[4];
  for (int t = 0; t < tables; ++t)
    table[t] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(symbols + 16 * t)));
  for (; n > 0; n -= 32, out += 32, bits.first += 4 * d) {
    const __m256i number = numbers.from(bits.first, d);
    __m256i found = _mm256_setzero_si256();
    for (int t = 0; t < tables; ++t) {
      const __m256i here = _mm256_xor_si256(number, _mm256_set1_epi8((char)(16 * t)));
      const __m256i place = _mm256_adds_epu8(here, _mm256_set1_epi8(0x70));
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(table[t], place));
    }
    uint8_t last[32];
    uint8_t* to = store != HuffmanStore::kWhole && n < 32 ? last : out;
    _mm256_storeu_si256((__m256i*)to, found);
    if (to == last) memcpy(out, last, (size_t)n);
  }
}

#include "huffman_decode_loops.h"

}  // namespace

HuffmanFault huffman_decode_avx2(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                 uint8_t* out, int64_t count, HuffmanStore store) {
  return decode_levels(tree, scratch, bytes, out, count, store);
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
