// Runs the CUDA kernels of huffman_decode_planes and merge_planes on buffers of a Python test.
#include "huffman_decode_planes.cuh"

#include <memory>

#include "runner.h"

namespace {

using namespace compressops;

// Of each plane: its bytes, and offsets and lengths, where it is coded.
struct Planes {
  const uint8_t* const* bytes;
  const int64_t* byte_counts;
  const int64_t* const* offsets;
  const uint8_t* const* lengths;
  const int* alphabets;
};

template <class Code>
int run(Code* output, int64_t count, const Planes& planes, int64_t chunk_size, bool turned,
        uint64_t* status, int order, unsigned seed, char* message) {
  constexpr int kPlanes = MergedCodes<Code>::kPlanes;
  std::unique_ptr<uint32_t[]> tables[kPlanes];
  HuffmanStatus words[kPlanes][kHuffmanStatusWords];
  for (HuffmanStatus* plane : words) {
    plane[0] = 0;
    plane[1] = kHuffmanNoBadChunk;
  }
  const int64_t chunks = ceil_div(count, chunk_size);
  const int result = cuda_on_cpu::guarded(order, seed, message, [&] {
    MergedCodes<Code> codes = {};
    codes.output = Global<Code>(output, count, "output");
    codes.count = count;
    codes.coded = kPlanes;
    HuffmanArgs coded[kPlanes];
    unsigned which = 0;
    for (int p = 0; p < kPlanes; ++p) {
      const Global<const uint8_t> bytes(planes.bytes[p], planes.byte_counts[p], "plane");
      if (planes.lengths[p] == nullptr) {
        codes.planes[p] = bytes;
        codes.raw |= 1u << p;
        continue;
      }
      which |= 1u << p;
      tables[p].reset(new uint32_t[kHuffmanTableWords]);
      coded[p].stream = bytes;
      coded[p].stream_bytes = planes.byte_counts[p];
      coded[p].offsets = Global<const int64_t>(planes.offsets[p], chunks + 1, "offsets");
      coded[p].chunks = chunks;
      coded[p].lengths = Global<const uint8_t>(planes.lengths[p], planes.alphabets[p], "lengths");
      coded[p].symbols = planes.alphabets[p];
      coded[p].num_symbols = count;
      coded[p].chunk_size = static_cast<int>(chunk_size);
      coded[p].table = Global<uint32_t>(tables[p].get(), kHuffmanTableWords, "table");
      coded[p].status = Global<HuffmanStatus>(words[p], kHuffmanStatusWords, "status");
    }
    return launch_huffman_decode_planes(codes, coded, which, turned, /*multiprocessors=*/1,
                                        nullptr);
  });
  for (int p = 0; p < kPlanes; ++p)
    for (int w = 0; w < kHuffmanStatusWords; ++w) status[2 * p + w] = words[p][w];
  return result;
}

}  // namespace

CUDA_ON_CPU_EXPORT int run_huffman_decode_planes(
    void* output, int bytes, int64_t count, const uint8_t* const* planes,
    const int64_t* byte_counts, const int64_t* const* offsets, const uint8_t* const* lengths,
    const int* alphabets, int64_t chunk_size, int turned, uint64_t* status, int order,
    unsigned seed, char* message) {
  const Planes all = {planes, byte_counts, offsets, lengths, alphabets};
  if (bytes == 2) {
    return run(static_cast<uint16_t*>(output), count, all, chunk_size, turned != 0, status, order,
               seed, message);
  }
  return run(static_cast<uint32_t*>(output), count, all, chunk_size, turned != 0, status, order,
             seed, message);
}
