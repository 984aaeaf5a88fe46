// Symbols to the bits of a chunk of a Huffman stream. This header is included by translation units
// that are compiled for different instruction sets, so it defines no function and includes nothing
// that would: a linker may keep the wrong copy of an inline function.
//
// In the order of their codes, the symbols below a node's child 1 follow those below its child 0.
// As ranks in that order, symbols are told apart by a comparison, and go down the tree level by
// level, grouped as the stream has them: vectors of them, without a look at any code.
#pragma once

#include <stdint.h>

#include "huffman_tree.h"

namespace compressops::cpu {

struct HuffmanCode {
  HuffmanTree tree;
  uint8_t length[kHuffmanMaxSymbols];  // 0: the symbol has no code
  uint8_t rank[kHuffmanMaxSymbols];    // of a symbol, in the order of the codes
  uint8_t limit[kHuffmanMaxSymbols];   // the least rank below a node's child 1, or in a group
};

// The code whose tree this is, built of the same lengths.
void huffman_build_code(const uint8_t* lengths, int symbols, const HuffmanTree& tree,
                        HuffmanCode& code);

// Kernels read and write whole vectors: so many bytes past the end of an array of the scratch.
constexpr int64_t kHuffmanEncodeSlack = 64;

// The ranks of two levels; one for each thread.
struct HuffmanEncodeScratch {
  uint8_t levels[2][kHuffmanMaxChunkSize + kHuffmanEncodeSlack];
};

// How many bits the codes of `count` symbols take; -1 if one of them has none.
int64_t huffman_count_bits(const HuffmanCode& code, const uint8_t* symbols, int64_t count);

// Writes the bits of `count` symbols, which all have codes of a tree with nodes: as many bytes as
// they take and no more.
using HuffmanEncode = void (*)(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                               const uint8_t* symbols, int64_t count, uint8_t* out);

void huffman_encode_baseline(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                             const uint8_t* symbols, int64_t count, uint8_t* out);
void huffman_encode_avx2(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                         const uint8_t* symbols, int64_t count, uint8_t* out);
void huffman_encode_avx512(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                           const uint8_t* symbols, int64_t count, uint8_t* out);

// Writes the chunk of `count` symbols, header and all, with the kernel that suits the processor:
// `bytes`, which is kHuffmanHeaderBytes and what huffman_count_bits takes.
void huffman_encode_chunk(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                          const uint8_t* symbols, int64_t count, uint8_t* out, int64_t bytes);

}  // namespace compressops::cpu
