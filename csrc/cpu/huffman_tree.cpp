#include "huffman_tree.h"

#include <array>

namespace compressops::cpu {

const char* huffman_build_tree(const uint8_t* lengths, int symbols, HuffmanTree& tree, int& kraft) {
  tree = {};
  tree.lone_symbol = -1;
  std::array<int, kHuffmanMaxLength + 1> counts{};
  for (int s = 0; s < symbols; ++s) {
    if (lengths[s] > kHuffmanMaxLength) return "a code length exceeds 12 bits";
    ++counts[lengths[s]];
  }
  const int present = symbols - counts[0];
  kraft = 0;
  for (int length = 1; length <= kHuffmanMaxLength; ++length)
    kraft += counts[length] << (kHuffmanMaxLength - length);
  if (present == 0) return nullptr;
  if (present == 1 && counts[1] == 1) {
    while (lengths[++tree.lone_symbol] == 0) {
    }
    return nullptr;
  }
  if (kraft != 1 << kHuffmanMaxLength) return "the Kraft sum of the code lengths is not 1";

  std::array<uint8_t, kHuffmanMaxSymbols> by_rank;  // in the order of their codes
  for (int length = 1, rank = 0; length <= kHuffmanMaxLength; ++length)
    for (int s = 0; s < symbols; ++s)
      if (lengths[s] == length) by_rank[rank++] = static_cast<uint8_t>(s);
  int inner = 1;
  for (int rank = 0; inner > 0; ++tree.levels) {
    const int first = tree.first_node[tree.levels], next = first + inner;
    // In the order of their codes, the leaves of a level come first.
    const int leaves = counts[tree.levels + 1];
    for (int place = 0; place < 2 * inner; ++place)
      tree.child[first + place / 2][place % 2] =
          static_cast<int16_t>(place < leaves ? -1 - by_rank[rank + place] : next + place - leaves);
    rank += leaves;
    inner = 2 * inner - leaves;
    tree.first_node[tree.levels + 1] = tree.nodes = next;
  }
  return nullptr;
}

const char* huffman_fault_text(HuffmanFault fault) {
  switch (fault) {
    case kHuffmanSound:
      return "no fault";
    case kHuffmanTruncated:
      return "it is shorter than a chunk's header";
    case kHuffmanTooLong:
      return "it is longer than any chunk";
    case kHuffmanChecksum:
      return "its CRC-32 is not the one that it states";
    case kHuffmanUnknownCodec:
      return "its codec is unknown";
    case kHuffmanOverrun:
      return "its codes run past its end";
    case kHuffmanLeftover:
      return "whole bytes are left over after the last code";
    case kHuffmanPadding:
      return "the bits after the last code are not 0";
    case kHuffmanNoCode:
      return "it holds bits that are no code";
  }
  return "unknown fault";
}

HuffmanFault huffman_check_end(const uint8_t* data, int64_t bytes, int64_t used) {
  const int64_t left = 8 * bytes - used;
  if (left < 0) return kHuffmanOverrun;
  if (left >= 8) return kHuffmanLeftover;
  return left > 0 && data[bytes - 1] >> (8 - left) != 0 ? kHuffmanPadding : kHuffmanSound;
}

}  // namespace compressops::cpu
