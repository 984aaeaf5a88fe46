// huffman_decode: chunks of a length-limited Huffman stream to bytes, or to codes that have them as
// one of their bytes.
//
// Kernel 1, one block, checks the code lengths and builds the tree of the codes' prefixes. Kernel 2
// gives each chunk to a block. A chunk holds the first bits of all prefixes, then the second bits
// grouped by the first, and so on, and where a prefix ends the numbers of its symbols
// (docs/FORMAT.md). So a symbol's bits are found one by one: its place below a node's child is the
// number of such bits before it in the node. Counts of the ones before every 64 bits, in shared
// memory beside the bits, answer that by one look-up and one popcount, and all symbols go down the
// tree on their own: no lane waits for where another one's code ended. A thread takes 16 symbols,
// whose bits stand beside each other, and writes them at once.
//
// Traffic: the stream once, the symbols once. Work: some ten instructions for each bit of a prefix
// and for a number, so a third of an instruction a warp and bit; of codes of 4 to 8 bits prefixes
// have 2 or 3. The CRC adds a tenth. Nothing in a broken stream leads out of an array: the first
// check is that each node's bits are there.
#pragma once

#include "device.cuh"
#include "huffman_crc.cuh"
#include "huffman_table.cuh"
#include "stream_words.cuh"

namespace compressops {

// A chunk in shared memory: its bits, and how many ones there are before each 64 of them.
struct HuffmanBits {
  Shared<uint64_t> words;
  Shared<uint32_t> ones;

  __device__ __forceinline__ uint32_t rank(unsigned bit) const {
    const uint64_t below = words[bit / 64] & ((uint64_t{1} << bit % 64) - 1);
    return ones[bit / 64] + static_cast<uint32_t>(__popcll(below));
  }
};

// What a symbol on its way down has to know of a node.
struct HuffmanNode {
  uint32_t start, rank;  // of its bits, and of the first of them
};

struct HuffmanBlock {
  Shared<uint32_t> links;  // [kHuffmanMaxSymbols], as kernel 1 leaves the nodes
  Shared<uint32_t> symbols;
  Shared<uint32_t> first_node;
  Shared<HuffmanNode> nodes;  // [kHuffmanMaxSymbols + 1]
  Shared<uint32_t> counts;
  Shared<uint32_t> crc_table;
  Shared<uint32_t> warp_sums;
  Shared<uint32_t> crc;
  int levels;
  int lone_symbol;
};

// Words of 64 bits for so many symbols, and two more: a rank may be asked for at the very end, and
// a number that ends there is read with what follows.
__host__ __device__ constexpr int64_t huffman_words(int64_t symbols) {
  return ceil_div<int64_t>(symbols * kHuffmanMaxLength, 64) + 2;
}

// And then as many ranks.
__host__ __device__ constexpr int64_t huffman_shared_bytes(int64_t words) {
  return 8 * (words + ceil_div<int64_t>(words, 2));
}

// The chunk's bits from the stream, their ranks, and the CRC over codec and bits.
__device__ __forceinline__ void huffman_load(const HuffmanArgs& args, const HuffmanBlock& block,
                                             const HuffmanBits& bits, int64_t begin, int64_t end) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int shift = misalignment(args.stream, 4);
  const int64_t data = begin + kHuffmanHeaderBytes + shift;
  const int bytes = static_cast<int>(end - begin) - kHuffmanHeaderBytes;
  const int words = bytes / 8 + 2;
  const Shared<uint32_t> halves = view_as<uint32_t>(bits.words);
  if (thread == 0) block.crc[0] = 0;
  for (int i = thread; i < 2 * words; i += kHuffmanThreads) {
    const int64_t at = data / 4 + i;
    const uint32_t low = load_stream_word(args.stream, shift, at, begin, end);
    const uint32_t high = load_stream_word(args.stream, shift, at + 1, begin, end);
    halves[i] = __funnelshift_r(low, high, static_cast<unsigned>(data % 4 * 8));
  }
  __syncthreads();

  // Each thread counts in a run of words, and then goes on from what is before it.
  const int run = ceil_div(words, kHuffmanThreads);
  const int first = min(thread * run, words), last = min(first + run, words);
  uint32_t ones = 0;
  for (int w = first; w < last; ++w) ones += static_cast<uint32_t>(__popcll(bits.words[w]));
  uint32_t up_to_here = ones;
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, up_to_here, static_cast<unsigned>(lanes));
    if (lane >= lanes) up_to_here += below;
  }
  if (lane == kWarpSize - 1) block.warp_sums[thread / kWarpSize] = up_to_here;
  __syncthreads();
  uint32_t before = up_to_here - ones;
  for (int warp = 0; warp < thread / kWarpSize; ++warp) before += block.warp_sums[warp];
  for (int w = first; w < last; ++w) {
    bits.ones[w] = before;
    before += static_cast<uint32_t>(__popcll(bits.words[w]));
  }

  const int segments = ceil_div(bytes, kCrcSegmentBytes);
  const Shared<uint8_t> payload = view_as<uint8_t>(bits.words);
  uint32_t crc = 0;
  for (int behind = thread; behind < segments; behind += kHuffmanThreads) {
    const int segment_end = bytes - behind * kCrcSegmentBytes;
    const bool is_first = behind == segments - 1;
    uint32_t state = is_first ? crc_step(block.crc_table, ~0u, kHuffmanCodec) : 0;
    for (int i = max(0, segment_end - kCrcSegmentBytes); i < segment_end; ++i)
      state = crc_step(block.crc_table, state, payload[i]);
    crc ^= crc_product(state, args.table[kHuffmanPowers + behind]);
  }
  atomicXor(block.crc + 0, crc);
  __syncthreads();
}

// Where each node's bits are, level by level, or that there are not so many.
__device__ __forceinline__ HuffmanError huffman_place_nodes(const HuffmanBlock& block,
                                                            const HuffmanBits& bits, int count,
                                                            int bytes) {
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned all_bits = 8u * static_cast<unsigned>(bytes);
  if (thread == 0) {
    block.nodes[0] = HuffmanNode{0, 0};
    block.counts[0] = static_cast<uint32_t>(count);
  }
  __syncthreads();
  unsigned level_start = 0;
  for (int level = 0; level < block.levels; ++level) {
    const int first = static_cast<int>(block.first_node[level]);
    const int next = static_cast<int>(block.first_node[level + 1]);
    const int v = first + thread;
    unsigned level_bits = 0, start = level_start;
    for (int other = first; other < next; ++other) {
      if (other == v) start = level_start + level_bits;
      level_bits += block.counts[other] * huffman_node_bits(block.links[other]);
    }
    if (level_bits > all_bits - level_start) return HuffmanError::kOverrun;
    if (v < next) {
      const uint32_t links = block.links[v];
      const uint32_t rank = bits.rank(start);
      block.nodes[v] = HuffmanNode{start, rank};
      if (!is_huffman_group(links)) {
        const uint32_t ones = bits.rank(start + block.counts[v]) - rank;
        const int zero_child = static_cast<int16_t>(links & 0xffffu);
        if (zero_child >= 0) block.counts[zero_child] = block.counts[v] - ones;
        block.counts[links >> 16] = ones;  // the last child is never a symbol
      }
    }
    level_start += level_bits;
    __syncthreads();
  }
  const unsigned used = block.lone_symbol >= 0 ? static_cast<unsigned>(count) : level_start;
  if (used > all_bits) return HuffmanError::kOverrun;
  if (all_bits - used >= 8) return HuffmanError::kLeftover;
  if (bits.rank(all_bits) != bits.rank(used)) return HuffmanError::kPadding;
  if (block.lone_symbol >= 0 && bits.rank(used) != 0) return HuffmanError::kNoCode;
  return HuffmanError::kNone;
}

// The symbol at `place` of a chunk.
__device__ __forceinline__ uint32_t huffman_symbol(const HuffmanBlock& block,
                                                   const HuffmanBits& bits, unsigned place) {
  int v = 0;
  for (int level = 0; level < block.levels; ++level) {
    const HuffmanNode node = block.nodes[v];
    const uint32_t links = block.links[v];
    if (is_huffman_group(links)) {
      const uint32_t width = huffman_node_bits(links), bit = node.start + place * width;
      const Shared<uint32_t> halves = view_as<uint32_t>(bits.words);
      const uint32_t low = halves[bit / 32], high = halves[bit / 32 + 1];
      const uint32_t number = __funnelshift_r(low, high, bit % 32) & ((1u << width) - 1);
      return block.symbols[(links >> 24) + number];
    }
    const unsigned bit = node.start + place;
    const uint64_t word = bits.words[bit / 64];
    const bool is_one = (word >> bit % 64 & 1) != 0;
    const uint32_t before = bits.ones[bit / 64] +
                            static_cast<uint32_t>(__popcll(word & ((uint64_t{1} << bit % 64) - 1)));
    const uint32_t ones = before - node.rank;
    place = is_one ? ones : place - ones;
    v = static_cast<int16_t>(is_one ? links >> 16 : links & 0xffffu);
    if (v < 0) break;
  }
  return static_cast<uint32_t>(-1 - v);
}

// All `count` symbols of a chunk to the sink, 16 to a thread, from where it likes them to begin.
template <class Sink>
__device__ __forceinline__ void huffman_write(const Sink& sink, const HuffmanBlock& block,
                                              const HuffmanBits& bits, int64_t begin, int count) {
  const int shift = sink.shift(begin);
  for (int group = static_cast<int>(threadIdx.x); 16 * group < shift + count;
       group += kHuffmanThreads) {
    const int first = 16 * group - shift;
    uint32_t four[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int place = min(max(first + i, 0), count - 1);
      const uint32_t symbol = block.lone_symbol >= 0
                                  ? static_cast<uint32_t>(block.lone_symbol)
                                  : huffman_symbol(block, bits, static_cast<unsigned>(place));
      four[i / 4] |= symbol << (8 * (i % 4));
    }
    sink.put(begin + first, max(0, -first), min(16, count - first), four);
  }
}

// Symbols to output [num_symbols], by 16-byte stores where all are there.
struct HuffmanBytes {
  Global<uint8_t> output;

  // How many bytes before `begin` 16 of them begin.
  __device__ __forceinline__ int shift(int64_t begin) const {
    return misalignment(output + begin, 16);
  }

  // Those [from, to) of 16 symbols at `first`.
  __device__ __forceinline__ void put(int64_t first, int from, int to,
                                      const uint32_t (&four)[4]) const {
    if (from == 0 && to == 16) {
      view_as<int4>(output + first)[0] =
          make_int4(static_cast<int>(four[0]), static_cast<int>(four[1]), static_cast<int>(four[2]),
                    static_cast<int>(four[3]));
      return;
    }
    for (int i = from; i < to; ++i)
      output[first + i] = static_cast<uint8_t>(four[i / 4] >> (8 * (i % 4)));
  }
};

template <class Sink>
__device__ __forceinline__ HuffmanError huffman_decode_chunk(const HuffmanArgs& args,
                                                             const Sink& sink,
                                                             const HuffmanBlock& block,
                                                             const HuffmanBits& bits,
                                                             int64_t chunk) {
  const int64_t begin = args.offsets[chunk], end = args.offsets[chunk + 1];
  if (begin < 0 || begin > end || end > args.stream_bytes) return HuffmanError::kOffsets;
  const int64_t output_begin = chunk * args.chunk_size;
  const int count =
      static_cast<int>(min(int64_t{args.chunk_size}, args.num_symbols - output_begin));
  const int64_t bytes = end - begin - kHuffmanHeaderBytes;
  if (bytes < ceil_div(count, 8) || bytes > ceil_div(count * kHuffmanMaxLength, 8))
    return HuffmanError::kSize;
  huffman_load(args, block, bits, begin, end);
  uint32_t stated = 0;
  for (int i = 0; i < 4; ++i) stated |= static_cast<uint32_t>(args.stream[begin + i]) << (8 * i);
  if (args.stream[begin + 4] != kHuffmanCodec) return HuffmanError::kCodec;
  if (~block.crc[0] != stated) return HuffmanError::kChecksum;
  const HuffmanError error = huffman_place_nodes(block, bits, count, static_cast<int>(bytes));
  if (error == HuffmanError::kNone) huffman_write(sink, block, bits, output_begin, count);
  return error;
}

template <class Sink>
__global__ void __launch_bounds__(kHuffmanThreads)
    huffman_decode_chunks(HuffmanArgs args, Sink sink) {
  COMPRESSOPS_SHARED_ARRAY(uint32_t, links, kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(uint32_t, symbols, kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(uint32_t, first_node, kHuffmanMaxLength + 1);
  COMPRESSOPS_SHARED_ARRAY(HuffmanNode, nodes, kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(uint32_t, counts, kHuffmanMaxSymbols);
  COMPRESSOPS_SHARED_ARRAY(uint32_t, crc_table, 256);
  COMPRESSOPS_SHARED_ARRAY(uint32_t, warp_sums, kHuffmanThreads / kWarpSize);
  COMPRESSOPS_SHARED_ARRAY(uint32_t, crc, 1);
  const int64_t words = huffman_words(min(int64_t{args.chunk_size}, args.num_symbols));
  COMPRESSOPS_DYNAMIC_SHARED(uint64_t, dynamic, huffman_shared_bytes(words));
  if (args.status[0] != 0)
    return;  // the table is no code: written before this launch, so all agree

  const int thread = static_cast<int>(threadIdx.x);
  const int levels = static_cast<int>(args.table[kHuffmanLevels]);
  static_assert(kHuffmanThreads == kHuffmanMaxSymbols);
  links[thread] = args.table[thread];
  symbols[thread] = args.table[kHuffmanSymbols + thread];
  if (thread <= levels) first_node[thread] = args.table[kHuffmanFirstNode + thread];
  crc_table[thread] = crc_byte(static_cast<unsigned>(thread));
  const HuffmanBlock block = {
      links,     symbols,   first_node, nodes,  counts,
      crc_table, warp_sums, crc,        levels, static_cast<int>(args.table[kHuffmanLoneSymbol])};
  const HuffmanBits bits = {slice(dynamic, 0, words),
                            view_as<uint32_t>(slice(dynamic, words, ceil_div<int64_t>(words, 2)))};
  for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
    __syncthreads();  // the tables are there, the chunk before is read
    const HuffmanError error = huffman_decode_chunk(args, sink, block, bits, chunk);
    if (thread == 0 && error != HuffmanError::kNone) {
      atomicMin(args.status + 1,
                static_cast<HuffmanStatus>(chunk) << 8 | static_cast<HuffmanStatus>(error));
    }
  }
}

// Launches both kernels; `args.status` tells afterwards how it went. Needs `chunks` =
// ceil(num_symbols / chunk_size), chunk_size from 1 to kHuffmanMaxChunkSize, symbols ≤ 256.
template <class Sink>
cudaError_t launch_huffman_decode(const HuffmanArgs& args, const Sink& sink,
                                  int64_t multiprocessors, cudaStream_t stream) {
  cudaError_t error =
      launch(huffman_build_table<kHuffmanThreads>, dim3(1), dim3(kHuffmanThreads), 0, stream, args);
  if (error != cudaSuccess || args.chunks == 0) return error;
  // Bits and ranks of the longest codes; of 32,768 symbols 74 KB, which leaves room for two blocks
  // on an SM of sm_80 and for three on one of sm_90.
  const int64_t most = args.num_symbols < args.chunk_size ? args.num_symbols : args.chunk_size;
  const auto shared_bytes = static_cast<size_t>(huffman_shared_bytes(huffman_words(most)));
  // Each block makes its tables once and goes on with the next chunks.
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t blocks = args.chunks < kBlocksPerMultiprocessor * multiprocessors
                             ? args.chunks
                             : kBlocksPerMultiprocessor * multiprocessors;
  return launch(huffman_decode_chunks<Sink>, dim3(static_cast<unsigned>(blocks)),
                dim3(kHuffmanThreads), shared_bytes, stream, args, sink);
}

}  // namespace compressops
