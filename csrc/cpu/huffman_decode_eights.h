// Merges of huffman_decode eight symbols at a time. Included by one translation unit per
// instruction set, inside its anonymous namespace, after it has defined
// merge_eight(zeros, ones, bits), the eight bytes that a merge makes; merge_symbols is its own.

inline int64_t count_ones(Bits bits, int64_t n) { return count_ones_by_words(bits, n); }

// What `merge` makes of each 8 bits, one after the other, to n bytes.
template <class Merge>
inline void merge_words(Bits bits, int64_t n, uint8_t* out, bool exact, Merge merge) {
  for (; n >= 64; n -= 64, out += 64, bits.first += 8) {
    const uint64_t word = bits.word(0);
    for (int j = 0; j < 64; j += 8) {
      const uint64_t symbols = merge((unsigned)(word >> j & 255));
      memcpy(out + j, &symbols, sizeof(symbols));
    }
  }
  uint64_t word = n > 0 ? bits.word(0) : 0;
  for (; n > 0; n -= 8, out += 8, word >>= 8) {
    const uint64_t symbols = merge((unsigned)(word & 255));
    memcpy(out, &symbols, exact && n < 8 ? (size_t)n : sizeof(symbols));
  }
}

inline void merge_symbol_node(Bits bits, int64_t n, int zero, const uint8_t* ones, uint8_t* out,
                              bool exact) {
  uint8_t zeros[8];
  memset(zeros, zero, sizeof(zeros));
  merge_words(bits, n, out, exact, [&](unsigned byte) {
    const uint64_t symbols = merge_eight(zeros, ones, byte);
    ones += __builtin_popcount(byte);
    return symbols;
  });
}

inline void merge_nodes(Bits bits, int64_t n, const uint8_t* zeros, const uint8_t* ones,
                        uint8_t* out, bool exact) {
  merge_words(bits, n, out, exact, [&](unsigned byte) {
    const uint64_t symbols = merge_eight(zeros, ones, byte);
    const int taken = __builtin_popcount(byte);
    ones += taken;
    zeros += 8 - taken;
    return symbols;
  });
}
