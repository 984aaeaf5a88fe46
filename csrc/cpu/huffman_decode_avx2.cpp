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
