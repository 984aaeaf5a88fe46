// huffman_decode on a CPU: threads take chunks, and huffman_decode_chunk each one of them.
#include "huffman_decode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>

#include "../check.h"
#include "huffman_op.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "huffman_decode";

void check_offsets(const int64_t* bounds, int64_t chunks, int64_t bytes) {
  COMPRESSOPS_CHECK(bounds[0] == 0, kOp, "offsets", "0 at its start", bounds[0]);
  COMPRESSOPS_CHECK(bounds[chunks] == bytes, kOp, "offsets",
                    "the stream's " + std::to_string(bytes) + " bytes at its end", bounds[chunks]);
  for (int64_t c = 0; c < chunks; ++c)
    COMPRESSOPS_CHECK(bounds[c] <= bounds[c + 1], kOp, "offsets",
                      "non-decreasing (chunk " + std::to_string(c) + ")", bounds[c + 1]);
}

void huffman_decode_out(const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
                        int64_t chunk_size, Tensor out) {
  COMPRESSOPS_CHECK(is_vector(stream, ScalarType::Byte), kOp, "stream",
                    "a contiguous CPU uint8 tensor [B]", stream);
  COMPRESSOPS_CHECK(is_vector(out, ScalarType::Byte), kOp, "out",
                    "a contiguous CPU uint8 tensor [num_symbols]", out);
  check_chunk_size(kOp, chunk_size);
  const int64_t num_symbols = out.numel();
  const int64_t chunks = (num_symbols + chunk_size - 1) / chunk_size;
  COMPRESSOPS_CHECK(is_vector(offsets, ScalarType::Long) && offsets.numel() == chunks + 1, kOp,
                    "offsets", "a contiguous CPU int64 tensor [" + std::to_string(chunks + 1) + "]",
                    offsets);
  const auto* bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  check_offsets(bounds, chunks, stream.numel());
  const HuffmanTree tree = tree_of(kOp, lengths, num_symbols);
  const auto* bytes = static_cast<const uint8_t*>(stream.const_data_ptr());
  auto* symbols = static_cast<uint8_t*>(out.mutable_data_ptr());

  const auto decode = [&](int64_t c, HuffmanScratch& scratch) {
    return huffman_decode_chunk(tree, scratch, bytes + bounds[c], bytes + bounds[c + 1],
                                symbols + c * chunk_size,
                                std::min(chunk_size, num_symbols - c * chunk_size));
  };

  std::atomic<int64_t> first_bad{chunks};
  const int64_t grain = std::max<int64_t>(1, kHuffmanMaxChunkSize / chunk_size);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<HuffmanScratch> scratch(new HuffmanScratch);
    for (int64_t c = begin; c < end; ++c) {
      if (decode(c, *scratch) == kHuffmanSound) continue;
      // A thread ends at its first one; another may have found one before that.
      int64_t known = first_bad.load();
      while (c < known && !first_bad.compare_exchange_weak(known, c)) {
      }
      return;
    }
  });
  const int64_t bad = first_bad.load();
  if (bad == chunks) return;
  const std::unique_ptr<HuffmanScratch> scratch(new HuffmanScratch);
  fail_argument(kOp, "stream", "a sound Huffman stream",
                "chunk " + std::to_string(bad) + ": " + huffman_fault_text(decode(bad, *scratch)));
}

Tensor huffman_decode(const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
                      int64_t num_symbols, int64_t chunk_size) {
  // Every symbol takes at least one bit: a lying count cannot ask for more memory than this.
  COMPRESSOPS_CHECK(
      num_symbols >= 0 && num_symbols / 8 + (num_symbols % 8 != 0) <= stream.numel(), kOp,
      "num_symbols",
      "between 0 and 8 times the " + std::to_string(stream.numel()) + " bytes of the stream",
      num_symbols);
  Tensor out = torch::stable::new_empty(stream, {num_symbols}, ScalarType::Byte);
  huffman_decode_out(stream, offsets, lengths, chunk_size, out);
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("huffman_decode", TORCH_BOX(&compressops::cpu::huffman_decode));
  m.impl("huffman_decode_out", TORCH_BOX(&compressops::cpu::huffman_decode_out));
}
