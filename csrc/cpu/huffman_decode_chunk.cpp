#include <cstring>

#include "cpu_features.h"
#include "crc32.h"
#include "huffman_decode.h"

namespace compressops::cpu {
namespace {

HuffmanDecode kernel() {
#if defined(__x86_64__)
  if (features().avx512_vbmi2) return huffman_decode_avx512;
  if (features().avx2) return huffman_decode_avx2;
#endif
  return huffman_decode_baseline;
}

HuffmanFault decode_lone_symbol(int symbol, const uint8_t* data, int64_t bytes, uint8_t* out,
                                int64_t count) {
  const HuffmanFault fault = huffman_check_end(data, bytes, count);
  if (fault != kHuffmanSound) return fault;
  for (int64_t i = 0; i < bytes; ++i)
    if (data[i] != 0) return kHuffmanNoCode;
  std::memset(out, symbol, static_cast<size_t>(count));
  return kHuffmanSound;
}

}  // namespace

HuffmanFault huffman_decode_chunk(const HuffmanTree& tree, HuffmanScratch& scratch,
                                  const uint8_t* begin, const uint8_t* end, uint8_t* out,
                                  int64_t count, bool past_caches) {
  const int64_t size = end - begin;
  if (size < kHuffmanHeaderBytes) return kHuffmanTruncated;
  if (size > static_cast<int64_t>(sizeof(scratch.chunk)) - kHuffmanSlack) return kHuffmanTooLong;
  uint8_t* chunk = scratch.chunk;
  std::memcpy(chunk, begin, static_cast<size_t>(size));
  std::memset(chunk + size, 0, static_cast<size_t>(kHuffmanSlack));
  uint32_t stated;
  std::memcpy(&stated, chunk, sizeof(stated));
  constexpr int64_t kChecksum = sizeof(stated);
  if (crc32()(chunk + kChecksum, size - kChecksum) != stated) return kHuffmanChecksum;
  if (chunk[kChecksum] != kHuffmanCodec) return kHuffmanUnknownCodec;
  const int64_t bytes = size - kHuffmanHeaderBytes;
  if (tree.lone_symbol >= 0)
    return decode_lone_symbol(tree.lone_symbol, chunk + kHuffmanHeaderBytes, bytes, out, count);
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kHuffmanAlignment == 0;
  return kernel()(tree, scratch, bytes, out, count,
                  past_caches && aligned ? HuffmanStore::kPastCaches : HuffmanStore::kExact);
}

}  // namespace compressops::cpu
