// huffman_decode: chunks of a canonical, length-limited Huffman stream to bytes.
//
// Kernel 1, one block, checks the code lengths and builds the table of all 2^12 windows. Kernel 2
// gives each chunk to a warp. A tile of 32 · 128 bits is split among the lanes, and each decodes
// its part from a guessed start: wrong at first, but Huffman codes synchronise themselves after a
// few symbols, so most lanes end where the true decoding would. Each lane then takes its left
// neighbour's end as its start and decodes again until nothing changes. After round r the first r
// lanes are certainly right, so 32 rounds suffice for any stream; three or so are typical.
// (A. Weißenberger, B. Schmidt: Massively Parallel Huffman Decoding on GPUs, ICPP 2018.)
//
// Traffic: the stream once, the symbols once. Nothing in a broken stream leads out of an array or
// round a loop more often than the bits that are there.
#pragma once

#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

constexpr int kHuffmanMaxLength = 12;
constexpr int kHuffmanMaxSymbols = 256;
constexpr int kHuffmanTableSize = 1 << kHuffmanMaxLength;
constexpr int kHuffmanTableThreads = 256;

// What can be wrong. The table's errors come first; a chunk's are packed with its index.
enum class HuffmanError : int {
  kNone = 0,
  kLengthTooLong,
  kKraftSum,
  kNoSymbols,
  kOffsets,
  kOverrun,
  kInvalidCode,
  kLeftover,
  kPadding,
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
    case HuffmanError::kOverrun:
      return "the codes run past the chunk's end";
    case HuffmanError::kInvalidCode:
      return "a bit pattern that is no code";
    case HuffmanError::kLeftover:
      return "whole bytes are left over after the last symbol";
    case HuffmanError::kPadding:
      return "padding bits are not 0";
  }
  return "unknown error";
}

// Two words on the device: the table's error, and (chunk << 8 | error) of the first bad chunk.
using HuffmanStatus = unsigned long long;
constexpr int kHuffmanStatusWords = 2;
constexpr HuffmanStatus kHuffmanNoBadChunk = ~0ull;

// A table entry: symbol | length << 8, and this bit where no code begins like the window; such an
// entry has length 1, so that a decoder always moves on.
constexpr unsigned kHuffmanInvalid = 0x8000u;

struct HuffmanArgs {
  Global<const uint8_t> stream;
  int64_t stream_bytes;
  Global<const int64_t> offsets;  // [chunks + 1]
  int64_t chunks;
  Global<const uint8_t> lengths;
  int symbols;  // size of the alphabet, at most 256
  int64_t num_symbols;
  int64_t chunk_size;
  Global<uint16_t> table;        // scratch [kHuffmanTableSize]
  Global<HuffmanStatus> status;  // [kHuffmanStatusWords]
  Global<uint8_t> output;        // [num_symbols]
};

// Canonical code numbers: by length, then by symbol; bit-reversed in the stream.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) huffman_build_table(HuffmanArgs args) {
  static_assert(kThreads >= kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(int, counts, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, first_code, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, first_rank, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(int, too_long, 1);
  COMPRESSOPS_SHARED_ARRAY(uint8_t, lengths, kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(uint8_t, by_rank, kHuffmanMaxSymbols);
  const int thread = static_cast<int>(threadIdx.x);

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
    int code = 0, rank = 0, present = 0;
    unsigned kraft = 0;  // in units of 2^-12
    for (int bits = 1; bits <= kHuffmanMaxLength; ++bits) {
      const int count = counts[bits];
      code <<= 1;
      first_code[bits] = code;
      first_rank[bits] = rank;
      code += count;
      rank += count;
      present += count;
      kraft += static_cast<unsigned>(count) << (kHuffmanMaxLength - bits);
    }
    const int singles = counts[1];
    const bool lone_symbol = present == 1 && singles == 1;
    HuffmanError error = HuffmanError::kNone;
    if (too_long[0] != 0) {
      error = HuffmanError::kLengthTooLong;
    } else if (present == 0) {
      if (args.num_symbols > 0) error = HuffmanError::kNoSymbols;
    } else if (kraft != kHuffmanTableSize && !lone_symbol) {
      error = HuffmanError::kKraftSum;
    }
    args.status[0] = static_cast<HuffmanStatus>(error);
    const bool ends_match = args.offsets[0] == 0 && args.offsets[args.chunks] == args.stream_bytes;
    args.status[1] =
        ends_match ? kHuffmanNoBadChunk : static_cast<HuffmanStatus>(HuffmanError::kOffsets);
  }
  __syncthreads();

  if (length > 0) {
    int before = 0;
    for (int other = 0; other < thread; ++other) before += lengths[other] == length;
    by_rank[first_rank[length] + before] = static_cast<uint8_t>(thread);
  }
  __syncthreads();

  for (int window = thread; window < kHuffmanTableSize; window += kThreads) {
    const int reversed = static_cast<int>(__brev(static_cast<unsigned>(window)) >> 20);
    unsigned entry = kHuffmanInvalid | 1u << 8;
    for (int bits = 1; bits <= kHuffmanMaxLength; ++bits) {
      const int place = (reversed >> (kHuffmanMaxLength - bits)) - first_code[bits];
      if (place >= 0 && place < counts[bits]) {
        const unsigned symbol = by_rank[first_rank[bits] + place];
        entry = symbol | static_cast<unsigned>(bits) << 8;
        break;
      }
    }
    args.table[window] = static_cast<uint16_t>(entry);
  }
}

// 8 warps share a table; with it a block takes 44 KB of shared memory, so an SM of sm_90 holds 5
// blocks and 40 chunks.
constexpr int kHuffmanWarps = 8;
constexpr int kHuffmanLaneBits = 128;
constexpr int kHuffmanTileBits = kWarpSize * kHuffmanLaneBits;
// A tile that begins inside its first word, and the window of its last symbol past its end.
constexpr int kHuffmanTileWords = kHuffmanTileBits / 32 + 2;
// At least a bit a symbol; symbols are placed as misaligned as they will be in the output.
constexpr int kHuffmanTileSymbols = kHuffmanTileBits + 16;

// Reads words of the tile as one row of bits.
class HuffmanReader {
 public:
  __device__ __forceinline__ HuffmanReader(Shared<uint32_t> words, int position)
      : words_(words), position_(position) {}

  __device__ __forceinline__ int position() const { return position_; }

  // The next table entry, past which it moves.
  __device__ __forceinline__ unsigned next(Shared<uint16_t> table) {
    const int word = position_ / 32;
    const unsigned low = words_[word], high = words_[word + 1];
    const unsigned window = __funnelshift_r(low, high, static_cast<unsigned>(position_ % 32));
    const unsigned entry = table[window % kHuffmanTableSize];
    position_ += static_cast<int>(entry >> 8 & 15u);
    return entry;
  }

 private:
  Shared<uint32_t> words_;
  int position_;
};

// Word `index` of the stream, counted from the aligned address at or before its start, with zeros
// for the bytes outside [begin, end). `shift`: how far before the start that address is.
__device__ __forceinline__ uint32_t load_stream_word(Global<const uint8_t> stream, int shift,
                                                     int64_t index, int64_t begin, int64_t end) {
  const int64_t first = 4 * index - shift;
  if (first >= begin && first + 4 <= end) {
    return load_nc<uint32_t>(view_as<const uint32_t>(stream + first), 0);
  }
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i >= begin && first + i < end) {
      word |= static_cast<uint32_t>(load_nc<uint8_t>(stream, first + i)) << (8 * i);
    }
  }
  return word;
}

// A warp writes `count` symbols, held in shared memory from `shift` on, to output[begin ...);
// `shift` is that address modulo 4, so that whole words go out as words.
__device__ __forceinline__ void store_symbols(Shared<uint8_t> symbols, int shift, int count,
                                              Global<uint8_t> output, int64_t begin) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int word = lane; 4 * word < shift + count; word += kWarpSize) {
    const int first = 4 * word;
    if (first >= shift && first + 4 <= shift + count) {
      const uint32_t four = view_as<uint32_t>(symbols)[word];
      view_as<uint32_t>(output + (begin + first - shift))[0] = four;
    } else {
      for (int i = max(first, shift); i < min(first + 4, shift + count); ++i) {
        output[begin + i - shift] = symbols[i];
      }
    }
  }
}

// A warp decodes one chunk: n symbols from the bytes [begin, end) of the stream.
__device__ __forceinline__ HuffmanError huffman_decode_chunk(
    const HuffmanArgs& args, Shared<uint16_t> table, Shared<uint32_t> words,
    Shared<uint8_t> symbols, int64_t begin, int64_t end, int64_t output_begin, int64_t n) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int stream_shift = misalignment(args.stream, 4);
  const int64_t end_bit = 8 * (end + stream_shift);
  int64_t bit = 8 * (begin + stream_shift);  // where the next symbol starts
  int64_t done = 0;
  bool invalid = false;

  while (done < n && bit < end_bit) {
    const int64_t first_word = bit / 32;
    __syncwarp();  // the tile before is read to its end
    for (int word = lane; word < kHuffmanTileWords; word += kWarpSize) {
      words[word] = load_stream_word(args.stream, stream_shift, first_word + word, begin, end);
    }
    __syncwarp();

    // Positions count from the first word. This lane's symbols are those that start in
    // [start, limit), where the guess for `start` is corrected until its neighbour agrees.
    const int tile_start = static_cast<int>(bit - 32 * first_word);
    const int64_t bits_left = end_bit - 32 * first_word;
    const int chunk_limit =
        static_cast<int>(min(bits_left, static_cast<int64_t>(tile_start + kHuffmanTileBits)));
    const int limit = min(tile_start + (lane + 1) * kHuffmanLaneBits, chunk_limit);
    int start = tile_start + lane * kHuffmanLaneBits;
    int stop = start, count = 0;
    bool again = true;
    for (int round = 0; round < kWarpSize; ++round) {
      if (again) {
        HuffmanReader reader(words, start);
        count = 0;
        while (reader.position() < limit) {
          reader.next(table);
          ++count;
        }
        stop = reader.position();
      }
      const int neighbour_stop = __shfl_up_sync(kFullWarp, stop, 1);
      again = lane > 0 && neighbour_stop != start;
      if (again) start = neighbour_stop;
      if (!__any_sync(kFullWarp, again)) break;
    }

    // Where this lane's symbols go: the counts of the lanes before, summed.
    int up_to_here = count;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const int below = __shfl_up_sync(kFullWarp, up_to_here, static_cast<unsigned>(lanes));
      if (lane >= lanes) up_to_here += below;
    }
    const int place = up_to_here - count;
    const int64_t wanted = n - done;
    const int tile_count =
        static_cast<int>(min(wanted, int64_t{__shfl_sync(kFullWarp, up_to_here, kWarpSize - 1)}));
    const int output_shift = misalignment(args.output + (output_begin + done), 4);
    HuffmanReader reader(words, start);
    for (int i = place; i < min(place + count, tile_count); ++i) {
      const unsigned entry = reader.next(table);
      invalid |= (entry & kHuffmanInvalid) != 0;
      symbols[output_shift + i] = static_cast<uint8_t>(entry & 0xffu);
    }
    // The tile ends behind the lane that wrote its last symbol.
    const bool wrote_last = count > 0 && place < tile_count && tile_count <= place + count;
    const unsigned last_lane = __ballot_sync(kFullWarp, wrote_last);
    const int tile_stop =
        __shfl_sync(kFullWarp, reader.position(), __ffs(static_cast<int>(last_lane)) - 1);
    __syncwarp();  // all symbols are in shared memory
    store_symbols(symbols, output_shift, tile_count, args.output, output_begin + done);
    done += tile_count;
    bit = 32 * first_word + tile_stop;
  }

  if (__any_sync(kFullWarp, invalid)) return HuffmanError::kInvalidCode;
  if (done < n || bit > end_bit) return HuffmanError::kOverrun;
  if (end_bit - bit >= 8) return HuffmanError::kLeftover;
  if (bit < end_bit) {
    const unsigned last_byte = args.stream[end - 1];
    if (last_byte >> (8 - (end_bit - bit)) != 0) return HuffmanError::kPadding;
  }
  return HuffmanError::kNone;
}

__global__ void __launch_bounds__(kHuffmanWarps* kWarpSize)
    huffman_decode_chunks(HuffmanArgs args) {
  COMPRESSOPS_SHARED_ARRAY(uint16_t, table, kHuffmanTableSize);
  COMPRESSOPS_SHARED_ARRAY(uint32_t, words, kHuffmanWarps* kHuffmanTileWords);
  COMPRESSOPS_SHARED_ARRAY(uint8_t, symbols, kHuffmanWarps* kHuffmanTileSymbols);
  if (args.status[0] != 0)
    return;  // the table is no code: written before this launch, so all agree

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  constexpr int kTableVectors = kHuffmanTableSize * static_cast<int>(sizeof(uint16_t)) / 16;
  for (int i = thread; i < kTableVectors; i += kHuffmanWarps * kWarpSize) {
    view_as<int4>(table)[i] =
        load_nc<int4>(view_as<const int4>(Global<const uint16_t>(args.table)), i);
  }
  __syncthreads();

  const Shared<uint32_t> my_words = slice(words, warp * kHuffmanTileWords, kHuffmanTileWords);
  const Shared<uint8_t> my_symbols =
      slice(symbols, warp * kHuffmanTileSymbols, kHuffmanTileSymbols);
  for (int64_t chunk = int64_t{blockIdx.x} * kHuffmanWarps + warp; chunk < args.chunks;
       chunk += int64_t{gridDim.x} * kHuffmanWarps) {
    const int64_t begin = args.offsets[chunk], end = args.offsets[chunk + 1];
    const int64_t output_begin = chunk * args.chunk_size;
    const int64_t n = min(args.chunk_size, args.num_symbols - output_begin);
    HuffmanError error = HuffmanError::kOffsets;
    if (begin >= 0 && begin <= end && end <= args.stream_bytes) {
      error = huffman_decode_chunk(args, table, my_words, my_symbols, begin, end, output_begin, n);
    }
    if (lane == 0 && error != HuffmanError::kNone) {
      atomicMin(args.status + 1,
                static_cast<HuffmanStatus>(chunk) << 8 | static_cast<HuffmanStatus>(error));
    }
  }
}

// Launches both kernels; `args.status` tells afterwards how it went. The table must be 16-byte
// aligned. Needs `chunks` = ceil(num_symbols / chunk_size), chunk_size > 0, symbols ≤ 256.
inline cudaError_t launch_huffman_decode(const HuffmanArgs& args, int64_t multiprocessors,
                                         cudaStream_t stream) {
  cudaError_t error = launch(huffman_build_table<kHuffmanTableThreads>, dim3(1),
                             dim3(kHuffmanTableThreads), 0, stream, args);
  if (error != cudaSuccess || args.chunks == 0) return error;
  // As many blocks as fit at once: each loads the table once and goes on with the next chunks.
  constexpr int64_t kBlocksPerMultiprocessor = 5;
  const int64_t wanted = ceil_div<int64_t>(args.chunks, kHuffmanWarps);
  const int64_t blocks = wanted < kBlocksPerMultiprocessor * multiprocessors
                             ? wanted
                             : kBlocksPerMultiprocessor * multiprocessors;
  return launch(huffman_decode_chunks, dim3(static_cast<unsigned>(blocks)),
                dim3(kHuffmanWarps * kWarpSize), 0, stream, args);
}

}  // namespace compressops
