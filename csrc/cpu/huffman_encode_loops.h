// The body of huffman_encode, written once. Included by one translation unit per instruction set,
// inside its anonymous namespace, after huffman_bits.h and the definitions of
//
//   to_ranks(code, symbols, n, ranks)    the ranks of n symbols
//   marks(ranks, limit)                  of 64 ranks, a bit 1 for those from the limit on
//   keep<kOnes>(ranks, n, limit, out)    of n ranks those from the limit on, or those below it
//
// They may read and write kHuffmanEncodeSlack bytes past the ends of arrays of the scratch; symbols
// are read to their end only.

// Bits one after the other, the first one lowest.
struct BitWriter {
  uint8_t* at;
  uint64_t held;
  int filled;

  // The lowest n of a word, n <= 64, whose other bits are 0.
  void append(uint64_t word, int n) {
    held |= word << filled;
    if (filled + n < 64) {
      filled += n;
      return;
    }
    memcpy(at, &held, sizeof(held));
    at += sizeof(held);
    held = word >> 1 >> (63 - filled);
    filled += n - 64;
  }
  void finish() const { memcpy(at, &held, (size_t)((filled + 7) / 8)); }
};

inline int64_t append_marks(BitWriter& bits, const uint8_t* ranks, int64_t n, int limit) {
  int64_t ones = 0;
  for (int64_t i = 0; i < n; i += 64) {
    const uint64_t word = low_bits(marks(ranks + i, limit), n - i);
    bits.append(word, n - i < 64 ? (int)(n - i) : 64);
    ones += __builtin_popcountll(word);
  }
  return ones;
}

// The numbers of n symbols in their group of 2^d, whose least rank is `first`: d bits each.
inline void append_numbers(BitWriter& bits, const uint8_t* ranks, int64_t n, int first, int d) {
  const uint64_t from = (uint64_t)first * 0x0101010101010101u;
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight;
    memcpy(&eight, ranks + i, sizeof(eight));
    const int width = d * (n - i < 8 ? (int)(n - i) : 8);
    bits.append(low_bits(fields_of_bytes(eight - from, d), width), width);
  }
}

inline void encode_levels(const HuffmanCode& code, HuffmanEncodeScratch& scratch,
                          const uint8_t* symbols, int64_t count, uint8_t* out) {
  const HuffmanTree& tree = code.tree;
  to_ranks(code, symbols, count, scratch.levels[0]);
  BitWriter bits = {out, 0, 0};
  int32_t counts[kHuffmanMaxSymbols];
  counts[0] = (int32_t)count;
  for (int level = 0; level < tree.levels; ++level) {
    const uint8_t* here = scratch.levels[level % 2];
    uint8_t* below = scratch.levels[(level + 1) % 2];
    // From left to right: what `keep` writes past its end is overwritten by the next one.
    for (int v = tree.first_node[level]; v < tree.first_node[level + 1]; ++v) {
      const int64_t n = counts[v];
      const int limit = code.limit[v], group_bits = tree.group_bits[v];
      if (group_bits > 0) {
        append_numbers(bits, here, n, limit, group_bits);
        here += n;
        continue;
      }
      const int64_t ones = append_marks(bits, here, n, limit);
      const int zero_child = tree.child[v][0], one_child = tree.child[v][1];
      if (zero_child >= 0) {
        counts[zero_child] = (int32_t)(n - ones);
        keep<false>(here, n, limit, below);
        below += n - ones;
      }
      counts[one_child] = (int32_t)ones;
      keep<true>(here, n, limit, below);
      below += ones;
      here += n;
    }
  }
  bits.finish();
}
