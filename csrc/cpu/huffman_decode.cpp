// huffman_decode on a CPU: a table look-up of max_length bits gives symbol and length. Four chunks
// are decoded side by side, because one chunk is a chain of dependent look-ups.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "../check.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "huffman_decode";
constexpr int kMaxLength = 12;
constexpr int kStreams = 4;
// A refilled 64-bit window holds at least 57 bits: four codes of 12.
constexpr int kSymbolsPerRefill = 4;
constexpr uint64_t kMask = (1u << kMaxLength) - 1;

struct Entry {
  uint8_t symbol;
  uint8_t length;  // 0: no code starts with these bits
};
using Table = std::array<Entry, 1 << kMaxLength>;

Table build_table(const Tensor& lengths_tensor, int64_t num_symbols) {
  const uint8_t* lengths = static_cast<const uint8_t*>(lengths_tensor.const_data_ptr());
  const int64_t alphabet = lengths_tensor.numel();
  std::array<uint32_t, kMaxLength + 1> counts{};
  for (int64_t s = 0; s < alphabet; ++s) {
    COMPRESSOPS_CHECK(lengths[s] <= kMaxLength, kOp, "lengths", "code lengths of at most 12 bits",
                      int64_t{lengths[s]});
    ++counts[lengths[s]];
  }
  const int64_t present = alphabet - counts[0];
  uint32_t kraft = 0;
  for (int length = 1; length <= kMaxLength; ++length)
    kraft += counts[length] << (kMaxLength - length);
  const bool single = present == 1 && counts[1] == 1;
  const bool none = present == 0 && num_symbols == 0;
  COMPRESSOPS_CHECK(kraft == (1u << kMaxLength) || single || none, kOp, "lengths",
                    "a complete prefix code (Kraft sum of 4096/4096)", int64_t{kraft});

  Table table{};
  std::array<uint32_t, kMaxLength + 2> next{};
  for (int length = 1; length <= kMaxLength; ++length)
    next[length + 1] = (next[length] + counts[length]) << 1;
  for (int64_t s = 0; s < alphabet; ++s) {
    const int length = lengths[s];
    if (length == 0) continue;
    const uint32_t code = next[length]++;
    uint32_t reversed = 0;
    for (int bit = 0; bit < length; ++bit) reversed |= (code >> bit & 1) << (length - 1 - bit);
    for (uint32_t i = reversed; i < table.size(); i += 1u << length)
      table[i] = {static_cast<uint8_t>(s), static_cast<uint8_t>(length)};
  }
  return table;
}

// One chunk: the bytes [position, end) hold the codes of `remaining` symbols.
struct Stream {
  const uint8_t* position;
  const uint8_t* end;
  uint8_t* out;
  int64_t remaining;
  uint64_t window = 0;
  int bits = 0;  // valid bits of the window

  bool can_refill_fast() const { return end - position >= 8 && remaining >= kSymbolsPerRefill; }

  void refill_fast() {
    uint64_t next;
    std::memcpy(&next, position, sizeof(next));
    window |= next << bits;
    const int taken = (63 - bits) >> 3;
    position += taken;
    bits += taken * 8;
  }

  // One code from the window, unchecked; its length, 0 where the table has no such code.
  uint8_t decode_fast(const Table& table, int64_t at) {
    const Entry entry = table[window & kMask];
    window >>= entry.length;
    bits -= entry.length;
    out[at] = entry.symbol;
    return entry.length;
  }

  void advance() {
    out += kSymbolsPerRefill;
    remaining -= kSymbolsPerRefill;
  }

  // Decodes the rest, its end with every bound checked; false if the chunk is corrupt.
  bool finish(const Table& table) {
    while (can_refill_fast()) {
      refill_fast();
      bool known = true;
      for (int i = 0; i < kSymbolsPerRefill; ++i) known &= decode_fast(table, i) != 0;
      if (!known) return false;
      advance();
    }
    // refill_fast leaves bits above `bits` in the window; they stand in the stream as well.
    window &= bits < 64 ? (uint64_t{1} << bits) - 1 : ~uint64_t{0};
    while (remaining > 0) {
      while (bits <= 56 && position < end) {
        window |= uint64_t{*position++} << bits;
        bits += 8;
      }
      const Entry entry = table[window & kMask];
      if (entry.length == 0 || entry.length > bits) return false;
      window >>= entry.length;
      bits -= entry.length;
      *out++ = entry.symbol;
      --remaining;
    }
    return position == end && bits < 8 && window == 0;
  }
};

// False if a code that the table lacks was met.
bool decode_side_by_side(Stream* streams, const Table& table) {
  Stream local[kStreams];
  std::copy(streams, streams + kStreams, local);
  bool known = true;
  while (known && local[0].can_refill_fast() && local[1].can_refill_fast() &&
         local[2].can_refill_fast() && local[3].can_refill_fast()) {
    for (Stream& stream : local) stream.refill_fast();
    for (int i = 0; i < kSymbolsPerRefill; ++i) {
      for (Stream& stream : local) known &= stream.decode_fast(table, i) != 0;
    }
    for (Stream& stream : local) stream.advance();
  }
  std::copy(local, local + kStreams, streams);
  return known;
}

Tensor huffman_decode(const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
                      int64_t num_symbols, int64_t chunk_size) {
  COMPRESSOPS_CHECK(stream.is_cpu() && stream.dim() == 1 &&
                        stream.scalar_type() == ScalarType::Byte && stream.is_contiguous(),
                    kOp, "stream", "a contiguous CPU uint8 tensor [B]", stream);
  COMPRESSOPS_CHECK(lengths.is_cpu() && lengths.dim() == 1 && lengths.is_contiguous() &&
                        lengths.scalar_type() == ScalarType::Byte && lengths.numel() <= 256,
                    kOp, "lengths", "a contiguous CPU uint8 tensor [S], S <= 256", lengths);
  COMPRESSOPS_CHECK(chunk_size > 0, kOp, "chunk_size", "positive", chunk_size);
  // Every symbol takes at least one bit: a lying count cannot ask for more memory than this.
  COMPRESSOPS_CHECK(
      num_symbols >= 0 && num_symbols / 8 + (num_symbols % 8 != 0) <= stream.numel(), kOp,
      "num_symbols",
      "between 0 and 8 times the " + std::to_string(stream.numel()) + " bytes of the stream",
      num_symbols);
  const int64_t chunks = num_symbols == 0 ? 0 : (num_symbols - 1) / chunk_size + 1;
  COMPRESSOPS_CHECK(offsets.is_cpu() && offsets.dim() == 1 && offsets.is_contiguous() &&
                        offsets.scalar_type() == ScalarType::Long && offsets.numel() == chunks + 1,
                    kOp, "offsets",
                    "a contiguous CPU int64 tensor [" + std::to_string(chunks + 1) + "]", offsets);
  const int64_t* bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  COMPRESSOPS_CHECK(bounds[0] == 0, kOp, "offsets", "0 at its start", bounds[0]);
  COMPRESSOPS_CHECK(bounds[chunks] == stream.numel(), kOp, "offsets",
                    "the stream's " + std::to_string(stream.numel()) + " bytes at its end",
                    bounds[chunks]);
  for (int64_t c = 0; c < chunks; ++c)
    COMPRESSOPS_CHECK(bounds[c] <= bounds[c + 1], kOp, "offsets",
                      "non-decreasing (chunk " + std::to_string(c) + ")", bounds[c + 1]);
  const Table table = build_table(lengths, num_symbols);

  Tensor out = torch::stable::new_empty(stream, {num_symbols});
  if (num_symbols == 0) return out;
  const uint8_t* bytes = static_cast<const uint8_t*>(stream.const_data_ptr());
  uint8_t* symbols = static_cast<uint8_t*>(out.mutable_data_ptr());
  std::atomic<int64_t> corrupt{-1};

  const auto stream_of = [&](int64_t c) {
    return Stream{bytes + bounds[c], bytes + bounds[c + 1], symbols + c * chunk_size,
                  std::min(chunk_size, num_symbols - c * chunk_size)};
  };
  const int64_t grain = std::max<int64_t>(kStreams, 65536 / chunk_size);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kStreams) {
      const int count = static_cast<int>(std::min<int64_t>(kStreams, end - c));
      Stream streams[kStreams] = {};
      for (int i = 0; i < count; ++i) streams[i] = stream_of(c + i);
      bool sound = count < kStreams || decode_side_by_side(streams, table);
      for (int i = 0; i < count; ++i) {
        if (!sound || !streams[i].finish(table)) {
          corrupt.store(c + i);
          return;
        }
      }
    }
  });
  COMPRESSOPS_CHECK(corrupt.load() < 0, kOp, "stream",
                    "a sound Huffman stream; a chunk is corrupt at or near index", corrupt.load());
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("huffman_decode", TORCH_BOX(&compressops::cpu::huffman_decode));
}
