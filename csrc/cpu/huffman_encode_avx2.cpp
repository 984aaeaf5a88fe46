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

#include "huffman_encode.h"

namespace compressops::cpu {
namespace {

#include "huffman_bits.h"

inline void to_ranks(const HuffmanCode& code, const uint8_t* symbols, int64_t n, uint8_t* ranks) {
  for (int64_t i = 0; i < n; ++i) ranks[i] = code.rank[symbols[i]];
}

inline uint32_t marks_of_32(const uint8_t* ranks, __m256i limits) {
  const __m256i there = _mm256_loadu_si256((const __m256i*)ranks);
  return (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(there, limits), there));
}

inline uint64_t marks(const uint8_t* ranks, int limit) {
  const __m256i limits = _mm256_set1_epi8((char)limit);
  return marks_of_32(ranks, limits) | (uint64_t)marks_of_32(ranks + 32, limits) << 32;
}

// For each of 256 masks: where the bytes are whose bits are 1.
struct Places {
  uint8_t of[256][8];
};

constexpr Places kPlaces = [] {
  Places places{};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0, taken = 0; i < 8; ++i)
      if (mask >> i & 1) places.of[mask][taken++] = (uint8_t)i;
  return places;
}();

template <bool kOnes>
inline void keep(const uint8_t* ranks, int64_t n, int limit, uint8_t* out) {
  for (int64_t i = 0; i < n; i += 64) {
    const uint64_t marked = marks(ranks + i, limit);
    uint64_t word = low_bits(kOnes ? marked : ~marked, n - i);
    for (int j = 0; j < 64; j += 8, word >>= 8) {
      const __m128i eight = _mm_loadl_epi64((const __m128i*)(ranks + i + j));
      const __m128i places = _mm_loadl_epi64((const __m128i*)kPlaces.of[word & 255]);
      _mm_storel_epi64((__m128i*)out, _mm_shuffle_epi8(eight, places));
      out += __builtin_popcountll(word & 255);
    }
  }
}

#include "huffman_encode_loops.h"

}  // namespace

void huffman_encode_avx2(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                         const uint8_t* symbols, int64_t count, uint8_t* out) {
  encode_levels(code, scratch, symbols, count, out);
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
