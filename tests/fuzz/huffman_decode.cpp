// Decodes random and damaged chunks of Huffman streams with every kernel that the processor has.
// tests/test_fuzz.py builds it with sanitizers and runs it; its arguments are seconds and a seed.
//
// A chunk is random bits, cut where the codes end, and then often damaged; most get a CRC that
// suits them, because none would come past the check otherwise. Kernels must agree on verdict and
// symbols, and touch nothing outside; what they encode of the symbols of a sound chunk must be that
// chunk. Last, every bit of a sound stream of 64 KB is flipped, and
// each flip must be found.
#include "huffman_decode.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "crc32.h"
#include "huffman_encode.h"

using namespace compressops::cpu;

namespace {

std::mt19937_64 random_bits;

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

// Of a complete code, mostly: leaves are split at random until there are enough. At first there are
// one or, so that large groups come up, 2^k.
std::vector<uint8_t> random_lengths() {
  const int symbols = 1 + static_cast<int>(below(kHuffmanMaxSymbols));
  const auto k = static_cast<uint8_t>(below(3) == 0 ? below(9) : 0);
  std::vector<uint8_t> lengths(size_t{1} << k, k);
  if (symbols == 1) return {1};
  while (static_cast<int>(lengths.size()) < symbols) {
    const auto at = static_cast<size_t>(below(static_cast<int64_t>(lengths.size())));
    if (lengths[at] == kHuffmanMaxLength) break;
    lengths.push_back(++lengths[at]);
  }
  if (below(16) == 0)
    lengths[static_cast<size_t>(below(symbols)) % lengths.size()] ^= 1 << below(5);
  return lengths;
}

void seal(std::vector<uint8_t>& chunk) {
  const uint32_t crc = crc32()(chunk.data() + 4, static_cast<int64_t>(chunk.size()) - 4);
  std::memcpy(chunk.data(), &crc, sizeof(crc));
}

// Random bits have the size that a chunk's codes need now and then; their number is found by
// walking down the tree as the decoder does.
int64_t bits_needed(const HuffmanTree& tree, const std::vector<uint8_t>& chunk, int64_t count) {
  std::vector<int64_t> counts(static_cast<size_t>(tree.nodes) + 1, 0);
  counts[0] = count;
  int64_t bit = 0;
  const int64_t bits = 8 * (static_cast<int64_t>(chunk.size()) - kHuffmanHeaderBytes);
  for (int v = 0; v < tree.nodes; ++v) {
    const int64_t n = counts[static_cast<size_t>(v)];
    const int group_bits = tree.group_bits[v];
    if (bit + n * std::max(1, group_bits) > bits) return -1;
    bit += n * group_bits;
    if (group_bits > 0) continue;
    for (int64_t i = 0; i < n; ++i, ++bit) {
      const int one = chunk[static_cast<size_t>(kHuffmanHeaderBytes + bit / 8)] >> (bit % 8) & 1;
      const int child = tree.child[v][one];
      if (child >= 0) ++counts[static_cast<size_t>(child)];
    }
  }
  return tree.lone_symbol >= 0 ? count : bit;
}

std::vector<uint8_t> random_chunk(const HuffmanTree& tree, int64_t count) {
  std::vector<uint8_t> chunk(
      static_cast<size_t>(kHuffmanHeaderBytes + (count * kHuffmanMaxLength + 7) / 8));
  const uint8_t skew = static_cast<uint8_t>(below(4) == 0 ? random_bits() : 255);
  for (uint8_t& byte : chunk) byte = static_cast<uint8_t>(random_bits()) & skew;
  if (tree.lone_symbol >= 0 && below(2) == 0) std::fill(chunk.begin(), chunk.end(), uint8_t{0});
  chunk[4] = kHuffmanCodec;
  const int64_t bits = bits_needed(tree, chunk, count);
  if (bits >= 0) {
    chunk.resize(static_cast<size_t>(kHuffmanHeaderBytes + (bits + 7) / 8));
    if (bits % 8 != 0) chunk.back() &= static_cast<uint8_t>((1 << bits % 8) - 1);
  }
  switch (below(8)) {
    case 0:
      chunk.resize(static_cast<size_t>(below(static_cast<int64_t>(chunk.size()) + 1)));
      break;
    case 1:
      chunk.resize(chunk.size() + static_cast<size_t>(below(100)));
      break;
    case 2:
      if (!chunk.empty())
        chunk[static_cast<size_t>(below(static_cast<int64_t>(chunk.size())))] ^=
            static_cast<uint8_t>(1 << below(8));
      break;
    default:
      break;
  }
  if (chunk.size() >= 4 && below(64) != 0) seal(chunk);
  return chunk;
}

struct Result {
  HuffmanFault fault;
  std::vector<uint8_t> symbols;
};

// In buffers of the very size, so that the sanitizer sees a step past their ends. Every other count
// is written past the caches.
Result decode(const HuffmanTree& tree, const std::vector<uint8_t>& chunk, int64_t count,
              HuffmanScratch& scratch) {
  const auto exact = std::make_unique<uint8_t[]>(chunk.size());
  std::copy(chunk.begin(), chunk.end(), exact.get());
  constexpr std::align_val_t kAligned{kHuffmanAlignment};
  auto* out = static_cast<uint8_t*>(operator new(static_cast<size_t>(count), kAligned));
  const HuffmanFault fault = huffman_decode_chunk(
      tree, scratch, exact.get(), exact.get() + chunk.size(), out, count, count % 2 == 1);
  Result result{fault, {}};
  if (fault == kHuffmanSound) result.symbols.assign(out, out + count);
  operator delete(out, kAligned);
  return result;
}

std::vector<uint8_t> encode(const HuffmanCode& code, const std::vector<uint8_t>& symbols,
                            HuffmanEncodeScratch& scratch) {
  const auto count = static_cast<int64_t>(symbols.size());
  const int64_t bits = huffman_count_bits(code, symbols.data(), count);
  std::vector<uint8_t> chunk(static_cast<size_t>(kHuffmanHeaderBytes + (bits + 7) / 8), 0x5a);
  huffman_encode_chunk(code, scratch, symbols.data(), count, chunk.data(),
                       static_cast<int64_t>(chunk.size()));
  return chunk;
}

[[noreturn]] void fail(const char* what, unsigned long long round) {
  std::printf("round %llu: %s\n", round, what);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  random_bits.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const char* kernels[] = {"baseline", "avx2", "native"};
  const auto scratch = std::make_unique<HuffmanScratch>();
  const auto ranks = std::make_unique<HuffmanEncodeScratch>();
  HuffmanCode code;
  unsigned long long rounds = 0, executions = 0, sound = 0, codes = 0;
  const auto began = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() <
         seconds) {
    const std::vector<uint8_t> lengths = random_lengths();
    HuffmanTree tree;
    int kraft = 0;
    if (huffman_build_tree(lengths.data(), static_cast<int>(lengths.size()), tree, kraft) !=
        nullptr)
      continue;
    if (tree.nodes == 0 && tree.lone_symbol < 0) continue;
    huffman_build_code(lengths.data(), static_cast<int>(lengths.size()), tree, code);
    ++codes;
    for (int i = 0; i < 32; ++i, ++rounds) {
      const int64_t count = 1 + below(below(64) == 0 ? kHuffmanMaxChunkSize : 300);
      const std::vector<uint8_t> chunk = random_chunk(tree, count);
      Result first;
      for (const char* kernel : kernels) {
        limit_isa(kernel);
        Result result = decode(tree, chunk, count, *scratch);
        ++executions;
        if (kernel == kernels[0]) {
          first = std::move(result);
          sound += first.fault == kHuffmanSound;
        } else if (result.fault != first.fault ||
                   (first.fault == kHuffmanSound && result.symbols != first.symbols)) {
          fail("kernels disagree", rounds);
        }
        if (first.fault == kHuffmanSound && encode(code, first.symbols, *ranks) != chunk)
          fail("a chunk is encoded in other bytes", rounds);
      }
    }
  }

  std::vector<uint8_t> lengths(16, 4);
  HuffmanTree tree;
  int kraft = 0;
  huffman_build_tree(lengths.data(), 16, tree, kraft);
  std::vector<uint8_t> chunk(kHuffmanHeaderBytes + kHuffmanMaxChunkSize / 2);
  int64_t flips = 0;
  for (int part = 0; part < 4; ++part) {
    for (uint8_t& byte : chunk) byte = static_cast<uint8_t>(random_bits());
    chunk[4] = kHuffmanCodec;
    seal(chunk);
    std::vector<uint8_t> out(static_cast<size_t>(kHuffmanMaxChunkSize));
    const auto fault = [&] {
      return huffman_decode_chunk(tree, *scratch, chunk.data(), chunk.data() + chunk.size(),
                                  out.data(), kHuffmanMaxChunkSize, false);
    };
    if (fault() != kHuffmanSound) fail("a sound chunk is refused", rounds);
    for (size_t bit = 0; bit < 8 * chunk.size(); ++bit, ++flips) {
      chunk[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
      if (fault() == kHuffmanSound) fail("a flipped bit is not found", bit);
      chunk[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    }
  }
  std::printf("%llu executions, %llu codes, %llu of %llu chunks sound, %lld flipped bits found\n",
              executions, codes, sound, rounds, static_cast<long long>(flips));
  return 0;
}
