// Huffman codes as the stream format has them (docs/FORMAT.md, "Huffman"). Included by translation
// units that are compiled for different instruction sets: it defines no function.
//
// A code is a prefix and d more bits: of the symbols of one length, groups of 2^d share a prefix,
// and the d bits count them. A chunk's bits stand level by level: first the first bit of each
// prefix, then the second bits of the longer ones, grouped by the first, and so on; where a prefix
// ends, the d bits of its symbols stand one after the other. The symbols below a node of the
// prefixes' tree are therefore those below its two children, merged as the node's bits say, and
// merging and looking up take many symbols at a time: nothing waits for where the last code ended.
// (Huffman-shaped wavelet trees: Grossi, Gupta, Vitter, SODA 2003.)
#pragma once

#include <stdint.h>

namespace compressops::cpu {

constexpr int kHuffmanMaxLength = 12;
constexpr int kHuffmanMaxSymbols = 256;
constexpr int64_t kHuffmanMaxChunkSize = 32768;
// In front of a chunk's bits: the CRC-32 of all that follows, then the codec.
constexpr int kHuffmanHeaderBytes = 5;
constexpr uint8_t kHuffmanCodec = 2;

// The nodes of the prefixes' tree that have bits: inner ones, and groups of at least two symbols.
struct HuffmanTree {
  int nodes;                                 // in the order of their bits
  int levels;                                // as many as have nodes
  int first_node[kHuffmanMaxLength + 1];     // of each level; behind the last one, `nodes`
  int16_t child[kHuffmanMaxSymbols][2];      // of an inner node: a node, or a symbol s as -1 - s
  uint8_t group_bits[kHuffmanMaxSymbols];    // d of a group; 0 of an inner node
  uint8_t group_first[kHuffmanMaxSymbols];   // of a group: where its 2^d symbols are in `symbols`
  uint8_t symbols[kHuffmanMaxSymbols + 64];  // in the order of their codes, and room for vectors
  int lone_symbol;  // -1, or the only symbol, whose bits are all 0: then there are no nodes
};

// The tree of the code of these lengths. What is wrong with them, or nullptr; `kraft` is then the
// Kraft sum, in units of 2^-12.
const char* huffman_build_tree(const uint8_t* lengths, int symbols, HuffmanTree& tree, int& kraft);

enum HuffmanFault : int {
  kHuffmanSound = 0,
  kHuffmanTruncated,
  kHuffmanTooLong,
  kHuffmanChecksum,
  kHuffmanUnknownCodec,
  kHuffmanOverrun,
  kHuffmanLeftover,
  kHuffmanPadding,
  kHuffmanNoCode,
};

const char* huffman_fault_text(HuffmanFault fault);

// Whether `used` bits end in the last of `bytes` bytes, and the rest of that is 0.
HuffmanFault huffman_check_end(const uint8_t* data, int64_t bytes, int64_t used);

}  // namespace compressops::cpu
