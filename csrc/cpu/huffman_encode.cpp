// huffman_encode on a CPU: threads take chunks, first to find how long each is, then to write it.
#include "huffman_encode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <tuple>

#include "../check.h"
#include "huffman_op.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "huffman_encode";

std::tuple<Tensor, Tensor> huffman_encode(const Tensor& symbols, const Tensor& lengths,
                                          int64_t chunk_size) {
  COMPRESSOPS_CHECK(
      symbols.is_cpu() && symbols.dim() == 1 && symbols.scalar_type() == ScalarType::Byte, kOp,
      "symbols", "a CPU uint8 tensor [N]", symbols);
  check_chunk_size(kOp, chunk_size);
  const Tensor contiguous = as_contiguous(symbols);
  const auto* from = static_cast<const uint8_t*>(contiguous.const_data_ptr());
  const int64_t count = symbols.numel(), chunks = (count + chunk_size - 1) / chunk_size;
  HuffmanCode code;
  const HuffmanTree tree = tree_of(kOp, lengths, count);
  huffman_build_code(static_cast<const uint8_t*>(lengths.const_data_ptr()),
                     static_cast<int>(lengths.numel()), tree, code);
  const auto part = [&](int64_t c) { return std::min(chunk_size, count - c * chunk_size); };

  Tensor offsets = torch::stable::new_empty(symbols, {chunks + 1}, ScalarType::Long);
  auto* bounds = static_cast<int64_t*>(offsets.mutable_data_ptr());
  std::atomic<bool> sound{true};
  const int64_t grain = std::max<int64_t>(1, kHuffmanMaxChunkSize / chunk_size);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t bits = huffman_count_bits(code, from + c * chunk_size, part(c));
      if (bits < 0) sound = false;
      bounds[c + 1] = kHuffmanHeaderBytes + (bits + 7) / 8;
    }
  });
  if (!sound) {
    const auto* bad = std::find_if(from, from + count, [&](uint8_t s) { return !code.length[s]; });
    fail_argument(kOp, "symbols", "symbols that have a code",
                  std::to_string(*bad) + ", whose length is 0");
  }
  bounds[0] = 0;
  for (int64_t c = 0; c < chunks; ++c) bounds[c + 1] += bounds[c];

  Tensor stream = torch::stable::new_empty(symbols, {bounds[chunks]}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(stream.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<HuffmanEncodeScratch> scratch(new HuffmanEncodeScratch);
    for (int64_t c = begin; c < end; ++c)
      huffman_encode_chunk(code, *scratch, from + c * chunk_size, part(c), bytes + bounds[c],
                           bounds[c + 1] - bounds[c]);
  });
  return {stream, offsets};
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("huffman_encode", TORCH_BOX(&compressops::cpu::huffman_encode));
}
