// Merges of huffman_decode eight symbols at a time. Included by one translation unit per
// instruction set, inside its anonymous namespace, after it has defined
// merge_eight(zeros, ones, bits), the eight bytes that a merge makes.

inline int64_t count_ones(Bits bits, int64_t n) { return count_ones_by_words(bits, n); }

// Eight bytes, 255 for each bit that is 1.
inline uint64_t spread(uint64_t bits) {
  const uint64_t each = bits * 0x0101010101010101u & 0x8040201008040201u;
  return (((each + 0x7f7f7f7f7f7f7f7fu) | each) >> 7 & 0x0101010101010101u) * 255;
}

inline void store_eight(uint8_t* out, int64_t left, uint64_t symbols, bool exact) {
  if (exact && left < 8) {
    memcpy(out, &symbols, (size_t)left);
  } else {
    memcpy(out, &symbols, sizeof(symbols));
  }
}

inline void merge_symbols(Bits bits, int64_t n, int zero, int one, uint8_t* out, bool exact) {
  const uint64_t zeros = (uint64_t)zero * 0x0101010101010101u;
  const uint64_t difference = (uint64_t)(zero ^ one) * 0x0101010101010101u;
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t word = bits.word(i);
    for (int64_t j = i; j < i + 64 && j < n; j += 8, word >>= 8) {
      const uint64_t symbols = zeros ^ (spread(word & 255) & difference);
      store_eight(out + j, n - j, symbols, exact);
    }
  }
}

template <bool kZeroIsSymbol>
inline void merge(Bits bits, int64_t n, const uint8_t* zeros, const uint8_t* ones, uint8_t* out,
                  bool exact) {
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t word = bits.word(i);
    for (int64_t j = i; j < i + 64 && j < n; j += 8, word >>= 8) {
      store_eight(out + j, n - j, merge_eight(zeros, ones, (unsigned)(word & 255)), exact);
      const int taken = __builtin_popcountll(word & 255);
      ones += taken;
      if (!kZeroIsSymbol) zeros += 8 - taken;
    }
  }
}

inline void merge_symbol_node(Bits bits, int64_t n, int zero, const uint8_t* ones, uint8_t* out,
                              bool exact) {
  uint8_t zeros[8];
  memset(zeros, zero, sizeof(zeros));
  merge<true>(bits, n, zeros, ones, out, exact);
}

inline void merge_nodes(Bits bits, int64_t n, const uint8_t* zeros, const uint8_t* ones,
                        uint8_t* out, bool exact) {
  merge<false>(bits, n, zeros, ones, out, exact);
}
