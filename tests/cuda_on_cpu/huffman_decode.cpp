// Runs the CUDA kernels of huffman_decode on buffers of a Python test.
#include "huffman_decode.cuh"

#include <memory>

#include "runner.h"

CUDA_ON_CPU_EXPORT int run_huffman_decode(const uint8_t* stream, int64_t stream_bytes,
                                          const int64_t* offsets, int64_t chunks,
                                          const uint8_t* lengths, int symbols, int64_t num_symbols,
                                          int64_t chunk_size, uint8_t* output, uint64_t* status,
                                          int order, unsigned seed, char* message) {
  using namespace compressops;
  const std::unique_ptr<uint32_t[]> table(new uint32_t[kHuffmanTableWords]);
  HuffmanStatus words[kHuffmanStatusWords] = {};
  const int result = cuda_on_cpu::guarded(order, seed, message, [&] {
    HuffmanArgs args;
    args.stream = Global<const uint8_t>(stream, stream_bytes, "stream");
    args.stream_bytes = stream_bytes;
    args.offsets = Global<const int64_t>(offsets, chunks + 1, "offsets");
    args.chunks = chunks;
    args.lengths = Global<const uint8_t>(lengths, symbols, "lengths");
    args.symbols = symbols;
    args.num_symbols = num_symbols;
    args.chunk_size = static_cast<int>(chunk_size);
    args.table = Global<uint32_t>(table.get(), kHuffmanTableWords, "table");
    args.status = Global<HuffmanStatus>(words, kHuffmanStatusWords, "status");
    const HuffmanBytes sink = {Global<uint8_t>(output, num_symbols, "output")};
    return launch_huffman_decode(args, sink, /*multiprocessors=*/1, nullptr);
  });
  status[0] = words[0];
  status[1] = words[1];
  return result;
}
