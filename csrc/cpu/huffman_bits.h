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

// Eight bytes below 2^d, d <= 8, to eight fields of d bits: by pairs, these by pairs, and again.
inline uint64_t fields_of_bytes(uint64_t bytes, int d) {
  constexpr uint64_t kOdd = 0xff00ff00ff00ff00u, kOddPair = 0xffff0000ffff0000u;
  bytes = (bytes & ~kOdd) | (bytes & kOdd) >> (8 - d);
  bytes = (bytes & ~kOddPair) | (bytes & kOddPair) >> (16 - 2 * d);
  return (bytes & 0xffffffffu) | bytes >> 32 << (4 * d);
}

// And back; bits above the fields do not matter.
inline uint64_t bytes_of_fields(uint64_t fields, int d) {
  const uint64_t one = (uint64_t{1} << d) - 1, two = (uint64_t{1} << 2 * d) - 1,
                 four = (uint64_t{1} << 4 * d) - 1;
  fields = (fields & four) | (fields >> (4 * d) & four) << 32;
  const uint64_t pairs = two * 0x100000001u, ones = one * 0x1000100010001u;
  fields = (fields & pairs) | (fields >> (2 * d) & pairs) << 16;
  return (fields & ones) | (fields >> d & ones) << 8;
}
