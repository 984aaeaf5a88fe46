// What the kernels of huffman_decode share, and the first of them: the tree of a code, built from
// its lengths by one block.
#pragma once

#include "device.cuh"
#include "huffman_crc.cuh"

namespace compressops {

constexpr int kHuffmanMaxLength = 12;
constexpr int kHuffmanMaxSymbols = 256;
constexpr int kHuffmanMaxChunkSize = 32768;
constexpr int kHuffmanHeaderBytes = 5;
constexpr int kHuffmanCodec = 2;
constexpr int kHuffmanThreads = 256;

// What can be wrong. The table's errors come first; a chunk's are packed with its index.
enum class HuffmanError : int {
  kNone = 0,
  kLengthTooLong,
  kKraftSum,
  kNoSymbols,
  kOffsets,
  kSize,
  kChecksum,
  kCodec,
  kOverrun,
  kLeftover,
  kPadding,
  kNoCode,
};

constexpr const char* huffman_error_text(HuffmanError error) {
  switch (error) {
    case HuffmanError::kNone:
      return "no error";
    case HuffmanError::kLengthTooLong:
      return "a code length exceeds 12 bits";
    case HuffmanError::kKraftSum:
      return "the Kraft sum of the code lengths is not 1";
    case HuffmanError::kNoSymbols:
      return "no symbol has a code";
    case HuffmanError::kOffsets:
      return "offsets do not rise from 0 to the stream's size";
    case HuffmanError::kSize:
      return "it is shorter or longer than its symbols can be";
    case HuffmanError::kChecksum:
      return "its CRC-32 is not the one that it states";
    case HuffmanError::kCodec:
      return "its codec is unknown";
    case HuffmanError::kOverrun:
      return "its codes run past its end";
    case HuffmanError::kLeftover:
      return "whole bytes are left over after the last code";
    case HuffmanError::kPadding:
      return "the bits after the last code are not 0";
    case HuffmanError::kNoCode:
      return "it holds bits that are no code";
  }
  return "unknown error";
}

// Two words on the device: the table's error, and (chunk << 8 | error) of the first bad chunk.
using HuffmanStatus = unsigned long long;
constexpr int kHuffmanStatusWords = 2;
constexpr HuffmanStatus kHuffmanNoBadChunk = ~0ull;

// What kernel 1 leaves to kernel 2, in words: the nodes that have bits, the first of them of each
// level and behind the last, the number of levels, the symbols by the lengths of their codes, the
// lone symbol or -1, and powers for the CRC. An inner node is its two children, 16 bits each: a
// node, or a symbol s as -1 - s. A group is kHuffmanGroup, and above it the bits d of its numbers
// and where its 2^d symbols begin, 8 bits each.
constexpr uint32_t kHuffmanGroup = 0x8000u;
constexpr int kHuffmanFirstNode = kHuffmanMaxSymbols;
constexpr int kHuffmanLevels = kHuffmanFirstNode + kHuffmanMaxLength + 1;
constexpr int kHuffmanSymbols = kHuffmanLevels + 1;
constexpr int kHuffmanLoneSymbol = kHuffmanSymbols + kHuffmanMaxSymbols;
constexpr int kHuffmanPowers = kHuffmanLoneSymbol + 1;
constexpr int kHuffmanTableWords = kHuffmanPowers + kCrcSegments;

__host__ __device__ constexpr bool is_huffman_group(uint32_t node) {
  return (node & 0xffffu) == kHuffmanGroup;
}

// Of a group the bits of a number, of an inner node one bit.
__host__ __device__ constexpr uint32_t huffman_node_bits(uint32_t node) {
  return is_huffman_group(node) ? node >> 16 & 255u : 1u;
}

struct HuffmanArgs {
  Global<const uint8_t> stream;
  int64_t stream_bytes;
  Global<const int64_t> offsets;  // [chunks + 1]
  int64_t chunks;
  Global<const uint8_t> lengths;
  int symbols;  // size of the alphabet, at most 256
  int64_t num_symbols;
  int chunk_size;                // at most kHuffmanMaxChunkSize
  Global<uint32_t> table;        // scratch [kHuffmanTableWords]
  Global<HuffmanStatus> status;  // [kHuffmanStatusWords]
};

// The tree of a code's prefixes, of `counts` symbols of each length that are a code. In a level
// groups come first, the shortest codes before others, and then inner nodes. A group of one symbol
// is no node: a level has at most one. One thread takes some microseconds for what are a few nodes.
__device__ __forceinline__ int huffman_link_nodes(Global<uint32_t> table, Shared<int> counts,
                                                  Shared<int> first_of, Shared<uint8_t> symbols) {
  int nodes = 0, level = 0;
  for (int places = 1, parent = 0; places > 0; ++level) {
    table[kHuffmanFirstNode + level] = static_cast<uint32_t>(nodes);
    int place = 0;
    uint32_t both = 0;
    const auto put = [&](int child) {
      both |= (static_cast<uint32_t>(child) & 0xffffu) << (16 * (place % 2));
      if (place % 2 == 1) {
        table[parent + place / 2] = both;
        both = 0;
      }
      ++place;
    };
    for (int bits = 0; level + bits <= kHuffmanMaxLength; ++bits) {
      const int size = 1 << bits, count = level + bits == 0 ? 0 : counts[level + bits];
      if ((count & size) == 0) continue;
      const int first = first_of[level + bits] + (count & -2 * size);
      if (bits == 0) {
        put(-1 - symbols[first]);
      } else {
        table[nodes] =
            kHuffmanGroup | static_cast<uint32_t>(bits) << 16 | static_cast<uint32_t>(first) << 24;
        put(nodes++);
      }
    }
    const int first_inner = nodes, inner = places - place;
    while (place < places) put(nodes++);
    parent = first_inner;
    places = 2 * inner;
  }
  table[kHuffmanFirstNode + level] = static_cast<uint32_t>(nodes);
  return level;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) huffman_build_table(HuffmanArgs args) {
  static_assert(kThreads >= kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(int, counts, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, first_of, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, too_long, 1);
  COMPRESSOPS_SHARED_ARRAY(int, kind, 1);  // of code: 0 none, 1 a lone symbol, 2 a tree
  COMPRESSOPS_SHARED_ARRAY(uint8_t, lengths, kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(uint8_t, by_length, kHuffmanMaxSymbols);
  const int thread = static_cast<int>(threadIdx.x);

  if (thread < kHuffmanMaxSymbols) {
    args.table[thread] = 0;
    args.table[kHuffmanSymbols + thread] = 0;
  }
  if (thread <= kHuffmanMaxLength) counts[thread] = 0;
  if (thread == 0) too_long[0] = 0;
  __syncthreads();
  int length = 0;
  if (thread < args.symbols) length = args.lengths[thread];
  if (length > kHuffmanMaxLength) {
    atomicOr(too_long + 0, 1);
    length = 0;
  }
  if (thread < kHuffmanMaxSymbols) lengths[thread] = static_cast<uint8_t>(length);
  if (length > 0) atomicAdd(counts + length, 1);
  __syncthreads();

  if (thread == 0) {
    int rank = 0;
    unsigned kraft = 0;  // in units of 2^-12
    for (int bits = 1; bits <= kHuffmanMaxLength; ++bits) {
      first_of[bits] = rank;
      rank += counts[bits];
      kraft += static_cast<unsigned>(counts[bits]) << (kHuffmanMaxLength - bits);
    }
    const int singles = counts[1];
    const bool lone_symbol = rank == 1 && singles == 1;
    HuffmanError error = HuffmanError::kNone;
    if (too_long[0] != 0) {
      error = HuffmanError::kLengthTooLong;
    } else if (rank == 0) {
      if (args.num_symbols > 0) error = HuffmanError::kNoSymbols;
    } else if (kraft != 1u << kHuffmanMaxLength && !lone_symbol) {
      error = HuffmanError::kKraftSum;
    }
    args.status[0] = static_cast<HuffmanStatus>(error);
    const bool ends_match = args.offsets[0] == 0 && args.offsets[args.chunks] == args.stream_bytes;
    args.status[1] =
        ends_match ? kHuffmanNoBadChunk : static_cast<HuffmanStatus>(HuffmanError::kOffsets);
    kind[0] = error != HuffmanError::kNone || rank == 0 ? 0 : lone_symbol ? 1 : 2;
    args.table[kHuffmanLevels] = 0;
    args.table[kHuffmanLoneSymbol] = ~0u;
  }
  __syncthreads();

  if (length > 0 && kind[0] != 0) {
    int before = 0;
    for (int other = 0; other < thread; ++other) before += lengths[other] == length;
    const int at = first_of[length] + before;
    by_length[at] = static_cast<uint8_t>(thread);
    args.table[kHuffmanSymbols + at] = static_cast<uint32_t>(thread);
    if (kind[0] == 1) args.table[kHuffmanLoneSymbol] = static_cast<uint32_t>(thread);
  }
  __syncthreads();

  if (thread == 0 && kind[0] == 2) {
    const int levels = huffman_link_nodes(args.table, counts, first_of, by_length);
    args.table[kHuffmanLevels] = static_cast<uint32_t>(levels);
  }
  for (int i = thread; i < kCrcSegments; i += kThreads)
    args.table[kHuffmanPowers + i] = crc_power(static_cast<unsigned>(i));
}

}  // namespace compressops
