#include <algorithm>
#include <cstring>

#include "cpu_features.h"
#include "crc32.h"
#include "huffman_encode.h"

namespace compressops::cpu {
namespace {

HuffmanEncode kernel() {
#if defined(__x86_64__)
  if (features().avx512_vbmi2) return huffman_encode_avx512;
  if (features().avx2) return huffman_encode_avx2;
#endif
  return huffman_encode_baseline;
}

}  // namespace

void huffman_build_code(const uint8_t* lengths, int symbols, const HuffmanTree& tree,
                        HuffmanCode& code) {
  code = {};
  code.tree = tree;
  std::memcpy(code.length, lengths, static_cast<size_t>(symbols));
  const auto present = symbols - std::count(lengths, lengths + symbols, 0);
  for (int rank = 0; rank < present; ++rank)
    code.rank[tree.symbols[rank]] = static_cast<uint8_t>(rank);
  uint8_t first[kHuffmanMaxSymbols] = {};  // rank below a node
  const auto first_of = [&](int child) { return child < 0 ? code.rank[-1 - child] : first[child]; };
  for (int v = tree.nodes - 1; v >= 0; --v) {
    const bool group = tree.group_bits[v] > 0;
    first[v] = group ? tree.group_first[v] : first_of(tree.child[v][0]);
    code.limit[v] = group ? first[v] : first_of(tree.child[v][1]);
  }
}

int64_t huffman_count_bits(const HuffmanCode& code, const uint8_t* symbols, int64_t count) {
  int64_t bits = 0;
  bool all = true;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t length = code.length[symbols[i]];
    bits += length;
    all &= length != 0;
  }
  return all ? bits : -1;
}

void huffman_encode_chunk(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                          const uint8_t* symbols, int64_t count, uint8_t* out, int64_t bytes) {
  if (code.tree.lone_symbol >= 0) {
    std::memset(out + kHuffmanHeaderBytes, 0, static_cast<size_t>(bytes - kHuffmanHeaderBytes));
  } else {
    kernel()(code, scratch, symbols, count, out + kHuffmanHeaderBytes);
  }
  constexpr int64_t kChecksum = sizeof(uint32_t);
  out[kChecksum] = kHuffmanCodec;
  const uint32_t checksum = crc32()(out + kChecksum, bytes - kChecksum);
  std::memcpy(out, &checksum, sizeof(checksum));
}

}  // namespace compressops::cpu
