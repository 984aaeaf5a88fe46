// The bits of a chunk of a Huffman stream to bytes. This header is included by translation units
// that are compiled for different instruction sets, so it defines no function and includes nothing
// that would: a linker may keep the wrong copy of an inline function.
#pragma once

#include <stdint.h>

#include "huffman_tree.h"

namespace compressops::cpu {

// Kernels read and write whole vectors: so many bytes past the end of an array of the scratch.
constexpr int64_t kHuffmanSlack = 128;

// What decoding takes beside the output; one for each thread.
struct HuffmanScratch {
  // The chunk, copied, so that what is checked is what is decoded, whoever writes to the stream.
  uint8_t chunk[kHuffmanHeaderBytes + kHuffmanMaxChunkSize * kHuffmanMaxLength / 8 + kHuffmanSlack];
  uint8_t levels[2][kHuffmanMaxChunkSize + kHuffmanSlack];
  // Memory that is wanted soon: what is behind the chunk, and what the caller comes to next. It is
  // fetched, and not read.
  const uint8_t* behind;
  const uint8_t* next;
};

// Decodes `count` symbols of the chunk in the scratch, which has `bytes` bytes of codes. Its bits
// must not be those of a lone symbol.
using HuffmanDecode = HuffmanFault (*)(const HuffmanTree& tree, HuffmanScratch& scratch,
                                       int64_t bytes, uint8_t* out, int64_t count);

HuffmanFault huffman_decode_baseline(const HuffmanTree& tree, HuffmanScratch& scratch,
                                     int64_t bytes, uint8_t* out, int64_t count);
HuffmanFault huffman_decode_avx2(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                 uint8_t* out, int64_t count);
HuffmanFault huffman_decode_avx512(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                   uint8_t* out, int64_t count);

// Checks and decodes the chunk [begin, end) with the kernel that suits the processor. `next` are as
// many bytes as there are symbols, which the caller reads or writes behind that: `out`, or others.
HuffmanFault huffman_decode_chunk(const HuffmanTree& tree, HuffmanScratch& scratch,
                                  const uint8_t* begin, const uint8_t* end, uint8_t* out,
                                  int64_t count, const uint8_t* next);

}  // namespace compressops::cpu
