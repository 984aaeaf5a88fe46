// Merges of huffman_decode eight symbols at a time. Included by one translation unit per
// instruction set, inside its anonymous namespace, after it has defined
// merge_eight(zeros, ones, bits), the eight bytes that a merge makes; look_up is its own, and falls
// back on look_up_each.

inline int64_t count_ones(Bits bits, int64_t n) { return count_ones_by_words(bits, n); }

// What `merge` makes of each 8 bits, one after the other, to n bytes.
template <class Merge>
inline void merge_words(Bits bits, int64_t n, uint8_t* out, HuffmanStore store, Merge merge) {
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
    memcpy(out, &symbols, store != HuffmanStore::kWhole && n < 8 ? (size_t)n : sizeof(symbols));
  }
}

// A word has eight fields and the bits before them: of 8 bits a field are all symbols there are,
// and then there are none before.
inline void look_up_each(Bits bits, int64_t n, int d, const uint8_t* symbols, uint8_t* out,
                         HuffmanStore store) {
  for (; n > 0; n -= 8, out += 8, bits.first += d) {
    uint64_t word;
    memcpy(&word, bits.first, sizeof(word));
    word = bytes_of_fields(word >> bits.shift, d);
    uint8_t eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = symbols[word >> 8 * i & 255];
    memcpy(out, eight, store != HuffmanStore::kWhole && n < 8 ? (size_t)n : sizeof(eight));
  }
}

inline void merge_symbol_node(Bits bits, int64_t n, int zero, const uint8_t* ones, uint8_t* out,
                              HuffmanStore store) {
  uint8_t zeros[8];
  memset(zeros, zero, sizeof(zeros));
  merge_words(bits, n, out, store, [&](unsigned byte) {
    const uint64_t symbols = merge_eight(zeros, ones, byte);
    ones += __builtin_popcount(byte);
    return symbols;
  });
}

inline void merge_nodes(Bits bits, int64_t n, const uint8_t* zeros, const uint8_t* ones,
                        uint8_t* out, HuffmanStore store) {
  merge_words(bits, n, out, store, [&](unsigned byte) {
    const uint64_t symbols = merge_eight(zeros, ones, byte);
    const int taken = __builtin_popcount(byte);
    ones += taken;
    zeros += 8 - taken;
    return symbols;
  });
}
