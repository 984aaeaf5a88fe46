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
};

// How symbols are written: with what else is in the last vector, without it, or without it and past
// the caches, to where vectors are aligned.
enum class HuffmanStore { kWhole, kExact, kPastCaches };
// Bytes that any vector is aligned to.
constexpr int64_t kHuffmanAlignment = 64;

// Decodes `count` symbols of the chunk in the scratch, which has `bytes` bytes of codes. Its bits
// must not be those of a lone symbol. `store` is not kWhole.
using HuffmanDecode = HuffmanFault (*)(const HuffmanTree& tree, HuffmanScratch& scratch,
                                       int64_t bytes, uint8_t* out, int64_t count,
                                       HuffmanStore store);

HuffmanFault huffman_decode_baseline(const HuffmanTree& tree, HuffmanScratch& scratch,
                                     int64_t bytes, uint8_t* out, int64_t count,
                                     HuffmanStore store);
HuffmanFault huffman_decode_avx2(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                 uint8_t* out, int64_t count, HuffmanStore store);
HuffmanFault huffman_decode_avx512(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                   uint8_t* out, int64_t count, HuffmanStore store);

// Checks and decodes the chunk [begin, end) with the kernel that suits the processor. With
// `past_caches` symbols are written to memory without being fetched, where `out` is aligned.
HuffmanFault huffman_decode_chunk(const HuffmanTree& tree, HuffmanScratch& scratch,
                                  const uint8_t* begin, const uint8_t* end, uint8_t* out,
                                  int64_t count, bool past_caches);

}  // namespace compressops::cpu
