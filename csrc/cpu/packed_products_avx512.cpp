#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "packed_products.h"

namespace compressops::cpu {
namespace {

void sum_groups(const int8_t* q, int64_t depth, int64_t group, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t start = 0; start < depth; start += group, ++sums) {
    const int64_t end = start + group < depth ? start + group : depth;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = start; k < end; k += 64) {
      const __mmask64 bytes = end - k >= 64 ? ~0ull : (1ull << (end - k)) - 1;
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(bytes, q + k));
    }
    *sums = _mm512_reduce_add_epi32(sum);
  }
}

void unpack(int bits, const uint8_t* packed, int width, int64_t blocks, uint8_t* panel) {
  const int parts = 8 / bits;
  const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
  for (int64_t b = 0; b < blocks; ++b)
    for (int column = 0; column < width; column += 16) {
      __m512i word = _mm512_loadu_si512(packed + (b * width + column) * 4);
      for (int part = 0; part < parts; ++part) {
        uint8_t* to = panel + ((b * parts + part) * width + column) * 4;
        _mm512_storeu_si512(to, _mm512_and_si512(word, mask));
        word = _mm512_srli_epi32(word, bits);
      }
    }
}

__m512i broadcast(const int8_t* q) {
  int four;
  __builtin_memcpy(&four, q, sizeof(four));
  return _mm512_set1_epi32(four);
}

// y += scales · (sums − zero · x_sum) of 16 columns.
void fold(__m512i sums, const PackedGroups& group, int64_t column, int32_t x_sum, float* y) {
  const __m512i zero =
      group.zeros == nullptr
          ? _mm512_set1_epi32(group.zero * x_sum)
          : _mm512_mullo_epi32(
                _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(group.zeros + column))),
                _mm512_set1_epi32(x_sum));
  const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, zero));
  _mm512_storeu_ps(
      y, _mm512_fmadd_ps(_mm512_loadu_ps(group.scales + column), exact, _mm512_loadu_ps(y)));
}

// Rows × Vectors sums stay in registers over the group: 12 × 2 of the 32, with 2 for the weights.
template <int Rows, int Vectors>
void multiply_block(const int8_t* q, int64_t q_stride, const uint8_t* panel, int64_t depth,
                    const PackedGroups& group, float* y) {
  __m512i sums[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sums[r][j] = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; k += 4, panel += Vectors * 64) {
    __m512i w[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) w[j] = _mm512_loadu_si512(panel + j * 64);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const __m512i x = broadcast(q + r * q_stride + k);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], w[j], x);
    }
  }
  // Through memory: GCC would keep the sums there all along if the branches below read them.
  alignas(64) int32_t stored[Rows][Vectors][16];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) _mm512_store_si512(stored[r][j], sums[r][j]);
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Vectors; ++j)
      fold(_mm512_load_si512(stored[r][j]), group, 16 * j, group.x_sums[r * group.x_sums_stride],
           y + (r * Vectors + j) * 16);
}

using Block = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const PackedGroups&,
                       float*);

template <int Vectors>
Block block_of(int rows) {
  constexpr Block blocks[kPackedRows] = {
      multiply_block<1, Vectors>,  multiply_block<2, Vectors>,  multiply_block<3, Vectors>,
      multiply_block<4, Vectors>,  multiply_block<5, Vectors>,  multiply_block<6, Vectors>,
      multiply_block<7, Vectors>,  multiply_block<8, Vectors>,  multiply_block<9, Vectors>,
      multiply_block<10, Vectors>, multiply_block<11, Vectors>, multiply_block<12, Vectors>};
  return blocks[rows - 1];
}

void multiply(const int8_t* q, int64_t q_stride, const uint8_t* panel, int width, int64_t depth,
              int rows, const PackedGroups& group, float* y) {
  const Block block = width == 32 ? block_of<2>(rows) : block_of<1>(rows);
  block(q, q_stride, panel, depth, group, y);
}

// Codes are not shifted down but masked where they are: those of the upper half of a byte count 16
// times (and of 2 bits, the upper of a half 4 times), in sums of their own, which are exact
// multiples of that. Memory is what limits few rows: a line of 64 bytes takes 3 to 7 instructions
// beside its products.
template <int Bits, int Rows, int Vectors>
void multiply_direct(const int8_t* q, int64_t q_stride, const uint8_t* packed, int64_t depth,
                     int64_t group, const PackedGroups& groups, float* y) {
  constexpr int kInputs = 32 / Bits;  // in a word
  constexpr int kWidth = 16 * Vectors;
  PackedGroups now = groups;
  const __m512i mask = _mm512_set1_epi8((char)((1 << Bits) - 1));
  const __m512i upper = _mm512_set1_epi8((char)(((1 << Bits) - 1) << Bits));
  for (int64_t start = 0; start < depth; start += group) {
    const int64_t end = start + group < depth ? start + group : depth;
    __m512i sums[2][Rows][Vectors];
    for (auto& half : sums)
      for (auto& row : half)
        for (auto& sum : row) sum = _mm512_setzero_si512();
    for (int64_t k = start; k < end; k += kInputs, packed += kWidth * 4) {
      __builtin_prefetch(packed + 2048);
      if constexpr (Vectors == 2) __builtin_prefetch(packed + 2048 + 64);
      __m512i words[Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) words[j] = _mm512_loadu_si512(packed + 64 * j);
#pragma GCC unroll 2
      for (int half = 0; half < 4 / Bits; ++half) {  // one for 4 bits, two for 2 bits
        __m512i low[Vectors], high[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) {
          const __m512i word = half == 0 ? words[j] : _mm512_srli_epi32(words[j], 4);
          low[j] = _mm512_and_si512(word, mask);
          high[j] = _mm512_and_si512(word, upper);
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const int8_t* x = q + r * q_stride + k + 8 * half;
          const __m512i first = broadcast(x), second = broadcast(x + 4);
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) {
            sums[0][r][j] = _mm512_dpbusd_epi32(sums[0][r][j], low[j], first);
            sums[1][r][j] = _mm512_dpbusd_epi32(sums[1][r][j], high[j], second);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const int32_t x_sum = now.x_sums[r * now.x_sums_stride];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        const __m512i both =
            _mm512_add_epi32(sums[0][r][j], _mm512_srai_epi32(sums[1][r][j], Bits));
        fold(both, now, 16 * j, x_sum, y + r * kWidth + 16 * j);
      }
    }
    now.scales += kWidth;
    if (now.zeros != nullptr) now.zeros += kWidth;
    ++now.x_sums;
  }
}

template <int Bits, int Vectors>
void multiply_few(const int8_t* q, int64_t q_stride, const uint8_t* packed, int64_t depth,
                  int64_t group, int rows, const PackedGroups& groups, float* y) {
  const auto run = rows == 1   ? multiply_direct<Bits, 1, Vectors>
                   : rows == 2 ? multiply_direct<Bits, 2, Vectors>
                   : rows == 3 ? multiply_direct<Bits, 3, Vectors>
                               : multiply_direct<Bits, 4, Vectors>;
  run(q, q_stride, packed, depth, group, groups, y);
}

void multiply_packed(int bits, const int8_t* q, int64_t q_stride, const uint8_t* packed, int width,
                     int64_t depth, int64_t group, int rows, const PackedGroups& groups, float* y) {
  const auto run = bits == 4 ? (width == 32 ? multiply_few<4, 2> : multiply_few<4, 1>)
                             : (width == 32 ? multiply_few<2, 2> : multiply_few<2, 1>);
  run(q, q_stride, packed, depth, group, rows, groups, y);
}

}  // namespace

const PackedProducts& packed_products_avx512() {
  static const PackedProducts products = {"avx512_vnni", sum_groups, unpack, multiply,
                                          multiply_packed};
  return products;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
