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
#include "huffman_decode_loops.h"

}  // namespace

HuffmanFault huffman_decode_baseline(const HuffmanTree& tree, HuffmanScratch& scratch,
                                     int64_t bytes, uint8_t* out, int64_t count) {
  return decode_levels(tree, scratch, bytes, out, count);
}

}  // namespace compressops::cpu
