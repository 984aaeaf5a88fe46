#include <stdint.h>
#include <string.h>

#include "huffman_encode.h"

namespace compressops::cpu {
namespace {

#include "huffman_bits.h"

inline void to_ranks(const HuffmanCode& code, const uint8_t* symbols, int64_t n, uint8_t* ranks) {
  for (int64_t i = 0; i < n; ++i) ranks[i] = code.rank[symbols[i]];
}

// Eight bytes in a word: a byte without its highest bit, taken from one that has it, borrows from
// no other byte, and leaves that bit where it was not the greater one.
inline uint64_t marks(const uint8_t* ranks, int limit) {
  constexpr uint64_t kEach = 0x0101010101010101u, kHigh = 0x8080808080808080u;
  const uint64_t low = kEach * (uint64_t)(limit & 127);
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    memcpy(&eight, ranks + 8 * i, sizeof(eight));
    const uint64_t not_less = (eight | kHigh) - low;
    const uint64_t marked = limit & 128 ? eight & not_less : eight | not_less;
    word |= ((marked & kHigh) >> 7) * 0x0102040810204080u >> 56 << (8 * i);
  }
  return word;
}

template <bool kOnes>
inline void keep(const uint8_t* ranks, int64_t n, int limit, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    *out = ranks[i];
    out += (ranks[i] >= limit) == kOnes;
  }
}

#include "huffman_encode_loops.h"

}  // namespace

void huffman_encode_baseline(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                             const uint8_t* symbols, int64_t count, uint8_t* out) {
  encode_levels(code, scratch, symbols, count, out);
}

}  // namespace compressops::cpu
