// Bits of a chunk, in words. Included by one translation unit per instruction set, inside its
// anonymous namespace.

// From a bit of `data` on, which lies anywhere in a byte.
struct Bits {
  const uint8_t* first;
  unsigned shift;

  Bits(const uint8_t* data, int64_t start)
      : first(data + ((uint64_t)start >> 3)), shift((unsigned)start & 7) {}

  // 64 bits from `offset` on, a multiple of 64; reads 9 bytes.
  uint64_t word(int64_t offset) const {
    const uint8_t* byte = first + ((uint64_t)offset >> 3);
    uint64_t low;
    memcpy(&low, byte, sizeof(low));
    return low >> shift | (uint64_t{byte[8]} << 1) << (63 - shift);
  }
};

// The lowest n bits of a word; all of it from 64 on.
inline uint64_t low_bits(uint64_t word, int64_t n) {
  return n >= 64 ? word : word & ((uint64_t{1} << n) - 1);
}

inline int64_t count_ones_by_words(Bits bits, int64_t n) {
  int64_t ones = 0;
  for (int64_t i = 0; i < n; i += 64) ones += __builtin_popcountll(low_bits(bits.word(i), n - i));
  return ones;
}
