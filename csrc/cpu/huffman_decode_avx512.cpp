#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(                                                              \
    __attribute__((target("bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vbmi,avx512bitalg," \
                          "avx512vpopcntdq"))),                                            \
    apply_to = function)
#else
#pragma GCC target("bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vbmi,avx512bitalg,avx512vpopcntdq")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "huffman_decode.h"

namespace compressops::cpu {
namespace {

#include "huffman_bits.h"

// Of whole bytes, by vectors, less those before the first bit and behind the last.
inline int64_t count_ones(Bits bits, int64_t n) {
  if (n <= 128) return count_ones_by_words(bits, n);
  const int64_t end = bits.shift + n, bytes = (end + 7) >> 3;
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < bytes; i += 64) {
    const __mmask64 there = (__mmask64)low_bits(~uint64_t{0}, bytes - i);
    const __m512i some = _mm512_maskz_loadu_epi8(there, bits.first + i);
    sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(some));
  }
  uint64_t parts[8];
  _mm512_storeu_si512(parts, sums);
  uint64_t ones = 0;
  for (const uint64_t part : parts) ones += part;
  const uint64_t before = low_bits(bits.first[0], bits.shift);
  const unsigned behind = bits.first[bytes - 1] >> 1 >> ((end + 7) & 7);
  return (int64_t)ones - __builtin_popcountll(before) - __builtin_popcount(behind);
}

struct Bytes {
  uint8_t of[64];
};
template <class Of>
constexpr Bytes bytes(Of of) {
  Bytes all{};
  for (int i = 0; i < 64; ++i) all.of[i] = (uint8_t)of(i);
  return all;
}
alignas(64) constexpr Bytes kIndex = bytes([](int i) { return i; });
// Of each 16 bytes: where byte i / 8 of a word is, and where byte 0 of these eight is.
alignas(64) constexpr Bytes kItsByte = bytes([](int i) { return i / 8; });
alignas(64) constexpr Bytes kFirstOfEight = bytes([](int i) { return i & 8; });
alignas(64) constexpr Bytes kItsBit = bytes([](int i) { return 1 << i % 8; });
alignas(64) constexpr Bytes kBitsBelow = bytes([](int i) { return (1 << i % 8) - 1; });
// Of a word: the bytes below byte i / 8.
alignas(64) constexpr Bytes kBytesBelow = bytes([](int i) { return i % 8 < i / 8 ? 255 : 0; });

inline __m512i load(const Bytes& bytes) { return _mm512_load_si512(&bytes); }

// Which of 64 bits are 1, and how many bits before each of them are.
struct Ranks {
  __mmask64 chosen;
  __m512i before;
};

// vpexpandb does all this, but takes 5 cycles on Zen 4, where the steps below take half of one each
// or one.
inline Ranks ranks(uint64_t word) {
  const __m512i words = _mm512_set1_epi64((long long)word);
  const __m512i its_byte = _mm512_shuffle_epi8(words, load(kItsByte));
  const __m512i in_byte = _mm512_popcnt_epi8(_mm512_and_si512(its_byte, load(kBitsBelow)));
  const __m512i in_word = _mm512_popcnt_epi64(_mm512_and_si512(words, load(kBytesBelow)));
  return {_mm512_test_epi8_mask(its_byte, load(kItsBit)),
          _mm512_add_epi8(in_byte, _mm512_shuffle_epi8(in_word, load(kFirstOfEight)))};
}

// n bytes, of which each call of `next` gives the next 64.
template <class Next>
inline void put(int64_t n, uint8_t* out, HuffmanStore store, Next next) {
  if (store == HuffmanStore::kPastCaches)
    for (; n >= 64; n -= 64, out += 64) _mm512_stream_si512((__m512i*)out, next());
  for (; n >= 64; n -= 64, out += 64) _mm512_storeu_si512(out, next());
  if (n <= 0) return;
  if (store == HuffmanStore::kWhole) {
    _mm512_storeu_si512(out, next());
  } else {
    _mm512_mask_storeu_epi8(out, (__mmask64)low_bits(~uint64_t{0}, n), next());
  }
}

// What `merge` makes of each 64 bits, one after the other, to n bytes.
template <class Merge>
inline void merge_words(Bits bits, int64_t n, uint8_t* out, HuffmanStore store, Merge merge) {
  put(n, out, store, [&] {
    const uint64_t word = bits.word(0);
    bits.first += 8;
    return merge(word);
  });
}

// Of 64 symbols of d bits each, the 8 d bytes: a word for each eight of them, whose fields then go
// to its bytes. vpermb looks at no more of a byte than it needs, and the symbols are repeated.
inline void look_up(Bits bits, int64_t n, int d, const uint8_t* symbols, uint8_t* out,
                    HuffmanStore store) {
  if (d == 8) {  // then these are all symbols there are, and stand in their order
    memcpy(out, bits.first, (size_t)n);
    return;
  }
  constexpr long long kEach = 0x0101010101010101, kCount = 0x0706050403020100;
  const __m512i eights = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i its_word = _mm512_add_epi64(
      _mm512_mullo_epi64(eights, _mm512_set1_epi64(d * kEach)), _mm512_set1_epi64(kCount));
  const __m512i its_field = _mm512_set1_epi64(d * kCount + bits.shift * kEach);
  const __m512i repeated = _mm512_and_si512(load(kIndex), _mm512_set1_epi8((char)((1 << d) - 1)));
  const __m512i low = _mm512_permutexvar_epi8(repeated, _mm512_loadu_si512(symbols));
  const __m512i high = d == 7 ? _mm512_loadu_si512(symbols + 64) : low;
  const auto next = [&] {
    const __m512i words = _mm512_permutexvar_epi8(its_word, _mm512_loadu_si512(bits.first));
    bits.first += 8 * d;
    return _mm512_permutex2var_epi8(low, _mm512_multishift_epi64_epi8(its_field, words), high);
  };
  put(n, out, store, next);
}

inline void merge_symbol_node(Bits bits, int64_t n, int zero, const uint8_t* ones, uint8_t* out,
                              HuffmanStore store) {
  const __m512i zeros = _mm512_set1_epi8((char)zero);
  merge_words(bits, n, out, store, [&](uint64_t word) {
    const Ranks rank = ranks(word);
    const __m512i there = _mm512_loadu_si512(ones);
    ones += __builtin_popcountll(word);
    return _mm512_mask_permutexvar_epi8(zeros, rank.chosen, rank.before, there);
  });
}

inline void merge_nodes(Bits bits, int64_t n, const uint8_t* zeros, const uint8_t* ones,
                        uint8_t* out, HuffmanStore store) {
  const __m512i second = _mm512_set1_epi8(64);  // of the two tables that are looked up
  merge_words(bits, n, out, store, [&](uint64_t word) {
    const Ranks rank = ranks(word);
    const __m512i place = _mm512_mask_add_epi8(_mm512_sub_epi8(load(kIndex), rank.before),
                                               rank.chosen, rank.before, second);
    const __m512i there = _mm512_loadu_si512(zeros), other = _mm512_loadu_si512(ones);
    const int taken = __builtin_popcountll(word);
    ones += taken;
    zeros += 64 - taken;
    return _mm512_permutex2var_epi8(there, place, other);
  });
}

#include "huffman_decode_loops.h"

}  // namespace

HuffmanFault huffman_decode_avx512(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                   uint8_t* out, int64_t count, HuffmanStore store) {
  const HuffmanFault fault = decode_levels(tree, scratch, bytes, out, count, store);
  // Before all that this thread writes next: others may wait for it to read the symbols.
  if (store == HuffmanStore::kPastCaches) _mm_sfence();
  return fault;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
