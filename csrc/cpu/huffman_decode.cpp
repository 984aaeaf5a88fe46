// huffman_decode on a CPU: threads take chunks, and huffman_decode_chunk each one of them.
#include "huffman_decode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "huffman_op.h"
#include "merge_planes.h"
#include "merge_planes_op.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "huffman_decode";
constexpr const char* kPlanesOp = "huffman_decode_planes";
// A result that no cache holds is written past the caches: it would be fetched only to be
// overwritten, and what is wanted again would make room for it. A smaller one may be used at once.
constexpr int64_t kPastCaches = int64_t{1} << 24;

void check_offsets(const char* op, const int64_t* bounds, int64_t chunks, int64_t bytes) {
  COMPRESSOPS_CHECK(bounds[0] == 0, op, "offsets", "0 at its start", bounds[0]);
  COMPRESSOPS_CHECK(bounds[chunks] == bytes, op, "offsets",
                    "the stream's " + std::to_string(bytes) + " bytes at its end", bounds[chunks]);
  for (int64_t c = 0; c < chunks; ++c)
    COMPRESSOPS_CHECK(bounds[c] <= bounds[c + 1], op, "offsets",
                      "non-decreasing (chunk " + std::to_string(c) + ")", bounds[c + 1]);
}

// A stream whose arguments were checked.
struct Coded {
  const uint8_t* bytes;
  // A copy: what was checked stays so, whoever writes to the offsets, as a result may that
  // overlaps.
  std::vector<int64_t> bounds;
  HuffmanTree tree;

  HuffmanFault decode(int64_t chunk, HuffmanScratch& scratch, uint8_t* out, int64_t count,
                      bool past_caches) const {
    return huffman_decode_chunk(tree, scratch, bytes + bounds[chunk], bytes + bounds[chunk + 1],
                                out, count, past_caches);
  }
};

Coded coded(const char* op, const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
            int64_t chunk_size, int64_t num_symbols) {
  COMPRESSOPS_CHECK(is_vector(stream, ScalarType::Byte), op, "stream",
                    "a contiguous CPU uint8 tensor [B]", stream);
  const int64_t chunks = (num_symbols + chunk_size - 1) / chunk_size;
  COMPRESSOPS_CHECK(is_vector(offsets, ScalarType::Long) && offsets.numel() == chunks + 1, op,
                    "offsets", "a contiguous CPU int64 tensor [" + std::to_string(chunks + 1) + "]",
                    offsets);
  const auto* from = static_cast<const int64_t*>(offsets.const_data_ptr());
  std::vector<int64_t> bounds(from, from + chunks + 1);
  check_offsets(op, bounds.data(), chunks, stream.numel());
  return {static_cast<const uint8_t*>(stream.const_data_ptr()), std::move(bounds),
          tree_of(op, lengths, num_symbols)};
}

// Threads take chunks: `Worker` makes what does them one after the other, and gives the fault of
// each. The first chunk that has one is an error.
template <class Worker>
void for_chunks(const char* op, int64_t chunks, int64_t chunk_size, const Worker& worker) {
  std::atomic<int64_t> first_bad{chunks};
  const int64_t grain = std::max<int64_t>(1, kHuffmanMaxChunkSize / chunk_size);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    auto decode = worker();
    for (int64_t c = begin; c < end; ++c) {
      if (decode(c) == kHuffmanSound) continue;
      // A thread ends at its first one; another may have found one before that.
      int64_t known = first_bad.load();
      while (c < known && !first_bad.compare_exchange_weak(known, c)) {
      }
      return;
    }
  });
  const int64_t bad = first_bad.load();
  if (bad == chunks) return;
  auto decode = worker();
  fail_argument(op, "stream", "a sound Huffman stream",
                "chunk " + std::to_string(bad) + ": " + huffman_fault_text(decode(bad)));
}

void huffman_decode_out(const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
                        int64_t chunk_size, Tensor out) {
  COMPRESSOPS_CHECK(is_vector(out, ScalarType::Byte), kOp, "out",
                    "a contiguous CPU uint8 tensor [num_symbols]", out);
  check_chunk_size(kOp, chunk_size);
  const int64_t num_symbols = out.numel();
  const Coded from = coded(kOp, stream, offsets, lengths, chunk_size, num_symbols);
  auto* symbols = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto worker = [&] {
    return [&, scratch = std::make_unique<HuffmanScratch>()](int64_t c) {
      const int64_t begin = c * chunk_size;
      return from.decode(c, *scratch, symbols + begin, std::min(chunk_size, num_symbols - begin),
                         num_symbols >= kPastCaches);
    };
  };
  for_chunks(kOp, offsets.numel() - 1, chunk_size, worker);
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

// One plane of a result: as it is, or coded.
struct Plane {
  const uint8_t* raw;
  Coded coded;
};

void huffman_decode_planes(Tensor out, std::vector<Tensor> planes, std::vector<Tensor> offsets,
                           std::vector<Tensor> lengths, int64_t chunk_size, bool turned) {
  const int64_t width = merged_bytes(out);
  COMPRESSOPS_CHECK(width != 0, kPlanesOp, "out",
                    "a contiguous CPU vector of 2 or 4 bytes an element", out);
  check_chunk_size(kPlanesOp, chunk_size);
  const int64_t count = out.numel();
  const auto check_each = [&](const char* name, const std::vector<Tensor>& tensors,
                              ScalarType dtype, const char* dtype_name) {
    COMPRESSOPS_CHECK(static_cast<int64_t>(tensors.size()) == width, kPlanesOp, name,
                      std::to_string(width) + " tensors, as out has bytes an element",
                      static_cast<int64_t>(tensors.size()));
    for (const Tensor& tensor : tensors)
      COMPRESSOPS_CHECK(is_vector(tensor, dtype), kPlanesOp, name,
                        std::string("contiguous CPU ") + dtype_name + " vectors", tensor);
  };
  check_each("planes", planes, ScalarType::Byte, "uint8");
  check_each("offsets", offsets, ScalarType::Long, "int64");
  check_each("lengths", lengths, ScalarType::Byte, "uint8");
  Plane from[4] = {};
  for (int64_t p = 0; p < width; ++p) {
    if (lengths[p].numel() != 0) {
      from[p].coded = coded(kPlanesOp, planes[p], offsets[p], lengths[p], chunk_size, count);
    } else {
      COMPRESSOPS_CHECK(planes[p].numel() == count, kPlanesOp, "planes",
                        "[" + std::to_string(count) + "] where they are not coded", planes[p]);
      from[p].raw = static_cast<const uint8_t*>(planes[p].const_data_ptr());
    }
  }
  auto* codes = static_cast<uint8_t*>(out.mutable_data_ptr());
  const MergePlanesKernels& merge = merge_planes_kernels();
  const bool past_caches = width * count >= kPastCaches;
  struct Buffers {
    HuffmanScratch scratch;
    uint8_t decoded[4][kHuffmanMaxChunkSize];
  };
  const auto worker = [&] {
    return [&, buffers = std::unique_ptr<Buffers>(new Buffers)](int64_t c) {
      const int64_t begin = c * chunk_size, length = std::min(chunk_size, count - begin);
      const uint8_t* parts[4] = {};
      for (int64_t p = 0; p < width; ++p) {
        parts[p] = from[p].raw != nullptr ? from[p].raw + begin : buffers->decoded[p];
        if (from[p].raw != nullptr) continue;
        const HuffmanFault fault =
            from[p].coded.decode(c, buffers->scratch, buffers->decoded[p], length, false);
        if (fault != kHuffmanSound) return fault;
      }
      if (width == 2)
        merge.two(reinterpret_cast<uint16_t*>(codes) + begin, parts, length, turned, past_caches);
      else
        merge.four(reinterpret_cast<uint32_t*>(codes) + begin, parts, length, turned, past_caches);
      return kHuffmanSound;
    };
  };
  for_chunks(kPlanesOp, (count + chunk_size - 1) / chunk_size, chunk_size, worker);
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("huffman_decode", TORCH_BOX(&compressops::cpu::huffman_decode));
  m.impl("huffman_decode_out", TORCH_BOX(&compressops::cpu::huffman_decode_out));
  m.impl("huffman_decode_planes", TORCH_BOX(&compressops::cpu::huffman_decode_planes));
}
