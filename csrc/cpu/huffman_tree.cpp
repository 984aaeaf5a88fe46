#include "huffman_tree.h"

#include <algorithm>
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

  std::array<uint8_t, kHuffmanMaxSymbols> by_length;
  std::array<int, kHuffmanMaxLength + 2> first_of{};  // of each length, where it begins there
  for (int length = 1; length <= kHuffmanMaxLength; ++length) {
    int at = first_of[length];
    for (int s = 0; s < symbols; ++s)
      if (lengths[s] == length) by_length[at++] = static_cast<uint8_t>(s);
    first_of[length + 1] = at;
  }
  // The symbols of a length are cut into groups as their number has bits, the largest first. Of a
  // level's prefixes the groups have the first, those with short codes before others, and inner
  // nodes have the rest. A group of one symbol is no node: there is at most one in a level.
  int rank = 0;
  for (int places = 1, parent = 0; places > 0; ++tree.levels) {
    const int level = tree.levels;
    tree.first_node[level] = tree.nodes;
    int place = 0;
    const auto put = [&](int child) {
      if (level > 0) tree.child[parent + place / 2][place % 2] = static_cast<int16_t>(child);
      ++place;
    };
    for (int bits = 0; level + bits <= kHuffmanMaxLength; ++bits) {
      const int length = level + bits, size = 1 << bits;
      if (length == 0 || !(counts[length] & size)) continue;
      const uint8_t* group = &by_length[first_of[length] + (counts[length] & -2 * size)];
      std::copy(group, group + size, tree.symbols + rank);
      if (bits > 0) {
        tree.group_bits[tree.nodes] = static_cast<uint8_t>(bits);
        tree.group_first[tree.nodes] = static_cast<uint8_t>(rank);
        put(tree.nodes++);
      } else {
        put(-1 - group[0]);
      }
      rank += size;
    }
    const int first_inner = tree.nodes, inner = places - place;
    while (place < places) put(tree.nodes++);
    parent = first_inner;
    places = 2 * inner;
  }
  tree.first_node[tree.levels] = tree.nodes;
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
