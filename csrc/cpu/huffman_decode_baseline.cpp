#include <stdint.h>
#include <string.h>

#include "huffman_decode.h"

namespace compressops::cpu {
namespace {

#include "huffman_bits.h"

inline uint64_t merge_eight(const uint8_t* zeros, const uint8_t* ones, unsigned bits) {
  uint64_t symbols = 0;
  for (int i = 0; i < 8; ++i, bits >>= 1) {
    // The choice is made without a branch: which it is cannot be predicted.
    const uint64_t bit = bits & 1, zero = *zeros, one = *ones;
    symbols |= (zero ^ ((zero ^ one) & -bit)) << (8 * i);
    ones += bit;
    zeros += 1 - bit;
  }
  return symbols;
}

#include "huffman_decode_eights.h"
// Eight bytes, 255 for each bit that is 1.
inline uint64_t spread(uint64_t bits) {
  const uint64_t each = bits * 0x0101010101010101u & 0x8040201008040201u;
  return (((each + 0x7f7f7f7f7f7f7f7fu) | each) >> 7 & 0x0101010101010101u) * 255;
}

inline void merge_symbols(Bits bits, int64_t n, int zero, int one, uint8_t* out,
                          HuffmanStore store) {
  const uint64_t zeros = (uint64_t)zero * 0x0101010101010101u;
  const uint64_t difference = (uint64_t)(zero ^ one) * 0x0101010101010101u;
  merge_words(bits, n, out, store,
              [&](unsigned byte) { return zeros ^ (spread(byte) & difference); });
}

inline void look_up(Bits bits, int64_t n, int d, const uint8_t* symbols, uint8_t* out,
                    HuffmanStore store) {
  if (d == 1) return merge_symbols(bits, n, symbols[0], symbols[1], out, store);
  look_up_each(bits, n, d, symbols, out, store);
}

#include "huffman_decode_loops.h"

}  // namespace

HuffmanFault huffman_decode_baseline(const HuffmanTree& tree, HuffmanScratch& scratch,
                                     int64_t bytes, uint8_t* out, int64_t count,
                                     HuffmanStore store) {
  return decode_levels(tree, scratch, bytes, out, count, store);
}

}  // namespace compressops::cpu
