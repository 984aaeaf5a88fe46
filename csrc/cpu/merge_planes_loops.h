// The loops of merge_planes over vectors. Included by one translation unit per instruction set,
// inside its anonymous namespace, after it has defined the struct Vec: a vector of kBytes, whose
// lo8 … hi16 interleave bytes and pairs of bytes within each of its quarters of 16 bytes, and whose
// `spread` orders it before, so that the results come out in order. `stream` stores past the
// caches, and `stream_end` puts these stores before all that follow.

template <bool kStreams>
inline void put(Vec codes, void* to) {
  if (kStreams) {
    codes.stream(to);
  } else {
    codes.store(to);
  }
}

template <bool kStreams>
inline void merge_two(uint16_t* out, const uint8_t* const* planes, int64_t count, bool turned) {
  int64_t i = 0;
  for (; i + Vec::kBytes <= count; i += Vec::kBytes) {
    const Vec low = Vec::load(planes[0] + i).spread_by_two();
    const Vec high = Vec::load(planes[1] + i).spread_by_two();
    const Vec codes[2] = {Vec::lo8(low, high), Vec::hi8(low, high)};
    for (int k = 0; k < 2; ++k)
      put<kStreams>(turned ? codes[k].turn_back16() : codes[k], out + i + k * (Vec::kBytes / 2));
  }
  for (; i < count; ++i) {
    const unsigned code = planes[0][i] | (unsigned)planes[1][i] << 8;
    out[i] = (uint16_t)(turned ? code >> 1 | code << 15 : code);
  }
}

template <bool kStreams>
inline void merge_four(uint32_t* out, const uint8_t* const* planes, int64_t count, bool turned) {
  int64_t i = 0;
  for (; i + Vec::kBytes <= count; i += Vec::kBytes) {
    Vec bytes[4];
    for (int p = 0; p < 4; ++p) bytes[p] = Vec::load(planes[p] + i).spread_by_four();
    const Vec low[2] = {Vec::lo8(bytes[0], bytes[1]), Vec::hi8(bytes[0], bytes[1])};
    const Vec high[2] = {Vec::lo8(bytes[2], bytes[3]), Vec::hi8(bytes[2], bytes[3])};
    for (int k = 0; k < 4; ++k) {
      const Vec codes =
          k % 2 ? Vec::hi16(low[k / 2], high[k / 2]) : Vec::lo16(low[k / 2], high[k / 2]);
      put<kStreams>(turned ? codes.turn_back32() : codes, out + i + k * (Vec::kBytes / 4));
    }
  }
  for (; i < count; ++i) {
    uint32_t code = 0;
    for (int p = 0; p < 4; ++p) code |= (uint32_t)planes[p][i] << (8 * p);
    out[i] = turned ? code >> 1 | code << 31 : code;
  }
}

inline bool is_aligned(const void* out) { return (uintptr_t)out % Vec::kBytes == 0; }

void two(uint16_t* out, const uint8_t* const* planes, int64_t count, bool turned,
         bool past_caches) {
  if (!past_caches || !is_aligned(out)) return merge_two<false>(out, planes, count, turned);
  merge_two<true>(out, planes, count, turned);
  Vec::stream_end();
}

void four(uint32_t* out, const uint8_t* const* planes, int64_t count, bool turned,
          bool past_caches) {
  if (!past_caches || !is_aligned(out)) return merge_four<false>(out, planes, count, turned);
  merge_four<true>(out, planes, count, turned);
  Vec::stream_end();
}
