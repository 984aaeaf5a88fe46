#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>

#include "packed_products.h"

namespace compressops::cpu {
namespace {

void sum_groups(const int8_t* q, int64_t depth, int64_t group, int32_t* sums) {
  for (int64_t start = 0; start < depth; start += group, ++sums) {
    int32_t sum = 0;
    for (int64_t k = start; k < depth && k < start + group; ++k) sum += q[k];
    *sums = sum;
  }
}

void unpack(int bits, const uint8_t* packed, int width, int64_t blocks, uint8_t* panel) {
  const int parts = 8 / bits;
  const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
  for (int64_t b = 0; b < blocks; ++b)
    for (int column = 0; column < width; column += 8) {
      __m256i word = _mm256_loadu_si256((const __m256i*)(packed + (b * width + column) * 4));
      for (int part = 0; part < parts; ++part) {
        uint8_t* to = panel + ((b * parts + part) * width + column) * 4;
        _mm256_storeu_si256((__m256i*)to, _mm256_and_si256(word, mask));
        word = _mm256_srli_epi32(word, bits);
      }
    }
}

__m256i broadcast(const int8_t* q) {
  int four;
  __builtin_memcpy(&four, q, sizeof(four));
  return _mm256_set1_epi32(four);
}

// sums + codes · x, in fours. Codes are at most 15, so that pairs of products fit 16 bits.
__m256i dot(__m256i sums, __m256i codes, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// y += scales · (sums + shift · zero) of 8 columns.
void fold(__m256i sums, const PackedGroups& group, int64_t column, int32_t row_shift, float* y) {
  __m256i shift = _mm256_set1_epi32(row_shift);
  if (group.zeros != nullptr)
    shift = _mm256_mullo_epi32(
        shift, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(group.zeros + column))));
  const __m256 exact = _mm256_cvtepi32_ps(_mm256_add_epi32(sums, shift));
  _mm256_storeu_ps(
      y, _mm256_fmadd_ps(_mm256_loadu_ps(group.scales + column), exact, _mm256_loadu_ps(y)));
}

// 2 × 4 sums, 4 vectors of weights and what `dot` needs fill the 16 registers.
template <int Rows, int Vectors>
void multiply_block(const int8_t* q, int64_t q_stride, const uint8_t* panel, int64_t depth,
                    const PackedGroups& group, float* y) {
  __m256i sums[Rows][Vectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm256_setzero_si256();
  for (int64_t k = 0; k < depth; k += 4, panel += Vectors * 32)
    for (int r = 0; r < Rows; ++r) {
      const __m256i x = broadcast(q + r * q_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j)
        sums[r][j] = dot(sums[r][j], _mm256_loadu_si256((const __m256i*)(panel + 32 * j)), x);
    }
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Vectors; ++j)
      fold(sums[r][j], group, 8 * j, group.shifts[r * group.shifts_stride],
           y + (r * Vectors + j) * 8);
}

template <int Vectors>
void multiply_rows(const int8_t* q, int64_t q_stride, const uint8_t* panel, int64_t depth,
                   int64_t group, int rows, PackedGroups now, float* y) {
  for (int64_t start = 0; start < depth; start += group) {
    const int64_t length = start + group < depth ? group : depth - start;
    const uint8_t* part = panel + start * Vectors * 8;
    PackedGroups row = now;
    int r = 0;
    for (; r + 2 <= rows; r += 2, row.shifts += 2 * row.shifts_stride)
      multiply_block<2, Vectors>(q + r * q_stride + start, q_stride, part, length, row,
                                 y + r * Vectors * 8);
    if (r < rows)
      multiply_block<1, Vectors>(q + r * q_stride + start, q_stride, part, length, row,
                                 y + r * Vectors * 8);
    now.scales += Vectors * 8;
    if (now.zeros != nullptr) now.zeros += Vectors * 8;
    ++now.shifts;
  }
}

void multiply(const int8_t* q, int64_t q_stride, const uint8_t* panel, int width, int64_t depth,
              int64_t group, int rows, const PackedGroups& groups, float* y) {
  const auto run = width == 32 ? multiply_rows<4> : multiply_rows<2>;
  run(q, q_stride, panel, depth, group, rows, groups, y);
}

template <int Bits, int Vectors>
void multiply_direct(const int8_t* q, const uint8_t* packed, int64_t depth, int64_t group,
                     PackedGroups now, float* y) {
  constexpr int kInputs = 32 / Bits;
  const __m256i mask = _mm256_set1_epi8((char)((1 << Bits) - 1));
  for (int64_t start = 0; start < depth; start += group) {
    const int64_t end = start + group < depth ? start + group : depth;
    __m256i sums[Vectors];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (int64_t k = start; k < end; k += kInputs, packed += Vectors * 32) {
      __m256i words[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j)
        words[j] = _mm256_loadu_si256((const __m256i*)(packed + 32 * j));
#pragma GCC unroll 4
      for (int part = 0; part < 8 / Bits; ++part) {
        const __m256i x = broadcast(q + k + 4 * part);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) {
          sums[j] = dot(sums[j], _mm256_and_si256(words[j], mask), x);
          words[j] = _mm256_srli_epi32(words[j], Bits);
        }
      }
    }
    for (int j = 0; j < Vectors; ++j) fold(sums[j], now, 8 * j, now.shifts[0], y + 8 * j);
    now.scales += Vectors * 8;
    if (now.zeros != nullptr) now.zeros += Vectors * 8;
    ++now.shifts;
  }
}

void multiply_packed(int bits, const int8_t* q, int64_t q_stride, const uint8_t* packed, int width,
                     int64_t depth, int64_t group, int rows, const PackedGroups& groups, float* y) {
  const auto run = bits == 4 ? (width == 32 ? multiply_direct<4, 4> : multiply_direct<4, 2>)
                             : (width == 32 ? multiply_direct<2, 4> : multiply_direct<2, 2>);
  PackedGroups row = groups;
  for (int r = 0; r < rows; ++r, row.shifts += groups.shifts_stride)
    run(q + r * q_stride, packed, depth, group, row, y + r * width);
}

}  // namespace

const PackedProducts& packed_products_avx2() {
  static const PackedProducts products = {"avx2", sum_groups, unpack, multiply, multiply_packed};
  return products;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
