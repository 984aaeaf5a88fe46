// The loops of pack_panels over vectors. Included by one translation unit per instruction set,
// inside its anonymous namespace, after it has defined the struct Vec: kWords words of 32 bits,
// whose lo32 … hi64 interleave words and pairs of words within each of its quarters of 16 bytes.
// `lanes` transposes quarters, and `sum_bytes` adds to each word the four signed bytes of another.

constexpr int kWords = Vec::kWords;
constexpr int kBytes = 4 * kWords;

// Of two vectors of bytes below 2^kBits, words of twice as many codes: byte i of a word holds the
// codes i and 4 + i.
template <int kBits>
inline Vec joined(Vec a, Vec b) {
  return Vec::even_words(a | a.shifted_right64(32 - kBits), b | b.shifted_right64(32 - kBits));
}

// One word of each of kWords rows, for kWords words: the transpose.
inline void transpose(Vec* rows) {
  Vec turned[kWords];
  for (int r = 0; r < kWords; r += 4) {
    const Vec a = Vec::lo32(rows[r], rows[r + 1]), b = Vec::hi32(rows[r], rows[r + 1]);
    const Vec c = Vec::lo32(rows[r + 2], rows[r + 3]), d = Vec::hi32(rows[r + 2], rows[r + 3]);
    // Quarter q of turned[4 * i + r / 4] holds the word 4 q + i of four rows.
    const int at = r / 4, step = kWords / 4;
    turned[at] = Vec::lo64(a, c);
    turned[at + step] = Vec::hi64(a, c);
    turned[at + 2 * step] = Vec::lo64(b, d);
    turned[at + 3 * step] = Vec::hi64(b, d);
  }
  for (int i = 0; i < 4; ++i) Vec::lanes(turned + i * (kWords / 4), rows + i);
}

// kWords words of kWords rows, at `codes`, to `words` lines at `out`.
template <int kBits>
inline void block(const PanelRows& rows, const int8_t* codes, int64_t stride, uint32_t* out,
                  int64_t words, Vec& sums) {
  constexpr int kLoads = 8 / kBits;
  const Vec zero = Vec::bytes(rows.zero), mask = Vec::bytes((1 << kBits) - 1);
  Vec line[kWords];
  for (int r = 0; r < kWords; ++r) {
    Vec part[kLoads];
    for (int k = 0; k < kLoads; ++k) {
      part[k] = Vec::load(codes + r * stride + k * kBytes);
      if (kBits < 8) part[k] = part[k].plus_bytes(zero) & mask;
    }
    if (kBits == 8)
      line[r] = part[0];
    else if (kBits == 4)
      line[r] = joined<4>(part[0], part[kLoads - 1]);
    else
      line[r] =
          joined<4>(joined<2>(part[0], part[1]), joined<2>(part[kLoads - 2], part[kLoads - 1]));
  }
  transpose(line);
  if (kBits == 8)
    for (int i = 0; i < kWords; ++i) sums = sums.sum_bytes(line[i]);
  for (int64_t i = 0; i < words; ++i) line[i].store(out + i * rows.width);
}

template <int kBits>
inline void pack(const PanelRows& rows) {
  constexpr int64_t kInputs = 32 / kBits, kDeep = kWords * kInputs;
  const int64_t words = (rows.inputs + kInputs - 1) / kInputs;
  int8_t padded[kWords * kDeep];
  Vec sums = Vec::bytes(0);
  for (int64_t word = 0; word < words; word += kWords) {
    const int8_t* codes = rows.codes + word * kInputs;
    const int64_t left = rows.inputs - word * kInputs;
    int64_t stride = rows.stride;
    if (rows.rows < kWords || left < kDeep) {
      // What is beyond the rows and inputs is written as 0.
      memset(padded, -rows.zero, sizeof(padded));
      const int64_t count = left < kDeep ? left : kDeep;
      for (int64_t r = 0; r < rows.rows; ++r)
        memcpy(padded + r * kDeep, codes + r * stride, (size_t)count);
      codes = padded;
      stride = kDeep;
    }
    block<kBits>(rows, codes, stride, rows.out + word * rows.width,
                 words - word < kWords ? words - word : kWords, sums);
  }
  if (rows.sums != nullptr) {
    int32_t found[kWords];
    sums.store(found);
    for (int64_t r = 0; r < rows.rows; ++r) rows.sums[r] += found[r];
  }
}

const PackPanelsKernels kKernels = {kWords, pack<8>, pack<4>, pack<2>};
