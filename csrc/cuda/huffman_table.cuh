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
constexpr int kHuffmanCodec = 1;
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

// What kernel 1 leaves to kernel 2, in words: the two children of each inner node (16 bits each; a
// node, or a symbol s as -1 - s), the first node of each level and behind the last, the number of
// levels, the lone symbol or -1, and powers for the CRC.
constexpr int kHuffmanFirstNode = kHuffmanMaxSymbols;
constexpr int kHuffmanLevels = kHuffmanFirstNode + kHuffmanMaxLength + 1;
constexpr int kHuffmanLoneSymbol = kHuffmanLevels + 1;
constexpr int kHuffmanPowers = kHuffmanLoneSymbol + 1;
constexpr int kHuffmanTableWords = kHuffmanPowers + kCrcSegments;

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
  Global<uint8_t> output;        // [num_symbols]
};

// Canonical code numbers: by length, then by symbol. In that order a level's leaves come first.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) huffman_build_table(HuffmanArgs args) {
  static_assert(kThreads >= kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(int, counts, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, first_rank, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, first_node, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, too_long, 1);
  COMPRESSOPS_SHARED_ARRAY(int, levels, 1);
  COMPRESSOPS_SHARED_ARRAY(uint8_t, lengths, kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(uint8_t, by_rank, kHuffmanMaxSymbols);
  const int thread = static_cast<int>(threadIdx.x);

  if (thread < kHuffmanMaxSymbols) args.table[thread] = 0;
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
      first_rank[bits] = rank;
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
    // Of a code that is none, no levels: the rest has nothing to do then.
    int inner = error == HuffmanError::kNone && rank > 1 ? 1 : 0, level = 0;
    first_node[0] = 0;
    for (; inner > 0; ++level) {
      first_node[level + 1] = first_node[level] + inner;
      inner = 2 * inner - counts[level + 1];
    }
    levels[0] = error == HuffmanError::kNone && lone_symbol ? -1 : level;
    args.table[kHuffmanLevels] = static_cast<uint32_t>(level);
    args.table[kHuffmanLoneSymbol] = ~0u;
  }
  __syncthreads();

  if (length > 0) {
    int before = 0;
    for (int other = 0; other < thread; ++other) before += lengths[other] == length;
    by_rank[first_rank[length] + before] = static_cast<uint8_t>(thread);
    if (levels[0] < 0) args.table[kHuffmanLoneSymbol] = static_cast<uint32_t>(thread);
  }
  __syncthreads();

  for (int level = 0; level < levels[0]; ++level) {
    const int first = first_node[level], next = first_node[level + 1], leaves = counts[level + 1];
    if (thread == 0) {
      args.table[kHuffmanFirstNode + level] = static_cast<uint32_t>(first);
      args.table[kHuffmanFirstNode + level + 1] = static_cast<uint32_t>(next);
    }
    if (thread < first || thread >= next) continue;
    uint32_t both = 0;
    for (int bit = 0; bit < 2; ++bit) {
      const int place = 2 * (thread - first) + bit;
      const int child =
          place < leaves ? -1 - by_rank[first_rank[level + 1] + place] : next + place - leaves;
      both |= (static_cast<uint32_t>(child) & 0xffffu) << (16 * bit);
    }
    args.table[thread] = both;
  }
  for (int i = thread; i < kCrcSegments; i += kThreads)
    args.table[kHuffmanPowers + i] = crc_power(static_cast<unsigned>(i));
}

}  // namespace compressops
