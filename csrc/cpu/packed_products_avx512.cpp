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

template <int Bits>
void unpack_words(const uint8_t* packed, int64_t row, int64_t blocks, uint8_t* panel) {
  constexpr int kParts = 8 / Bits;
  const __m512i mask = _mm512_set1_epi8((char)((1 << Bits) - 1));
  for (int64_t b = 0; b < blocks; ++b, packed += row, panel += kParts * row)
    for (int64_t i = 0; i < row; i += 64) {
      // What is unpacked next time: the products in between give it time to come.
      __builtin_prefetch(packed + blocks * row + i, 0, 2);
      const __m512i word = _mm512_loadu_si512(packed + i);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part)
        _mm512_storeu_si512(panel + part * row + i,
                            _mm512_and_si512(_mm512_srli_epi32(word, Bits * part), mask));
    }
}

void unpack(int bits, const uint8_t* packed, int width, int64_t blocks, uint8_t* panel) {
  (bits == 4 ? unpack_words<4> : unpack_words<2>)(packed, 4 * width, blocks, panel);
}

__m512i broadcast(const int8_t* q) {
  int four;
  __builtin_memcpy(&four, q, sizeof(four));
  return _mm512_set1_epi32(four);
}

// What the sums of 16 columns of the rows begin with.
template <int Rows, int Vectors>
__attribute__((always_inline)) inline void begin(const PackedGroups& group,
                                                 __m512i (&sums)[Rows][Vectors]) {
  if (group.zeros == nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j)
        sums[r][j] = _mm512_set1_epi32(group.shifts[r * group.shifts_stride]);
  } else {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      const __m512i zeros =
          _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(group.zeros + 16 * j)));
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
        sums[r][j] =
            _mm512_mullo_epi32(zeros, _mm512_set1_epi32(group.shifts[r * group.shifts_stride]));
    }
  }
}

// y += scales · sums of 16 columns.
void fold(__m512i sums, const float* scales, float* y) {
  _mm512_storeu_ps(
      y, _mm512_fmadd_ps(_mm512_loadu_ps(scales), _mm512_cvtepi32_ps(sums), _mm512_loadu_ps(y)));
}

// Rows × Vectors integer sums of a group, and as many of all groups, stay in registers: 6 × 2 × 2
// of the 32, with 2 for the weights.
template <int Rows, int Vectors>
void multiply_block(const int8_t* q, int64_t q_stride, const uint8_t* panel, int64_t depth,
                    int64_t group, const PackedGroups& groups, float* y) {
  __m512 totals[Rows][Vectors];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) totals[r][j] = _mm512_loadu_ps(y + (r * Vectors + j) * 16);
  PackedGroups now = groups;
  for (int64_t start = 0; start < depth; start += group) {
    const int64_t end = start + group < depth ? start + group : depth;
    __m512i sums[Rows][Vectors];
    begin(now, sums);
    for (int64_t k = start; k < end; k += 4, panel += Vectors * 64) {
      __m512i w[Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) w[j] = _mm512_loadu_si512(panel + j * 64);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m512i x = broadcast(q + r * q_stride + k);
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], w[j], x);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      const __m512 scales = _mm512_loadu_ps(now.scales + 16 * j);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r)
        totals[r][j] = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(sums[r][j]), totals[r][j]);
    }
    now.scales += Vectors * 16;
    if (now.zeros != nullptr) now.zeros += Vectors * 16;
    ++now.shifts;
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(y + (r * Vectors + j) * 16, totals[r][j]);
}

using Block = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, int64_t,
                       const PackedGroups&, float*);

template <int Vectors>
Block block_of(int rows) {
  constexpr Block blocks[kPackedRows] = {multiply_block<1, Vectors>, multiply_block<2, Vectors>,
                                         multiply_block<3, Vectors>, multiply_block<4, Vectors>,
                                         multiply_block<5, Vectors>, multiply_block<6, Vectors>};
  return blocks[rows - 1];
}

void multiply(const int8_t* q, int64_t q_stride, const uint8_t* panel, int width, int64_t depth,
              int64_t group, int rows, const PackedGroups& groups, float* y) {
  const Block block = width == 32 ? block_of<2>(rows) : block_of<1>(rows);
  block(q, q_stride, panel, depth, group, groups, y);
}

// Memory is what limits few rows: a line of 64 bytes takes 3 to 8 instructions beside its products.
template <int Bits, int Rows, int Vectors>
void multiply_direct(const int8_t* q, int64_t q_stride, const uint8_t* packed, int64_t depth,
                     int64_t group, const PackedGroups& groups, float* y) {
  constexpr int kInputs = 32 / Bits;  // in a word
  constexpr int kWidth = 16 * Vectors;
  constexpr int kParts = 8 / Bits;
  // What memory sends in its latency; the next panel follows this one. With fewer rows the
  // processor's own prefetchers are faster: it is the caches' bandwidth that limits them.
  constexpr int kAhead = 8192, kAheadRows = 4;
  // Chains of products, of each sum: eight and more hide what one takes.
  constexpr int kChains = Rows * Vectors >= 8 ? 1 : Rows * Vectors >= 4 ? 2 : kParts;
  PackedGroups now = groups;
  const __m512i mask = _mm512_set1_epi8((char)((1 << Bits) - 1));
  for (int64_t start = 0; start < depth; start += group) {
    const int64_t end = start + group < depth ? start + group : depth;
    __m512i sums[kChains][Rows][Vectors];
    begin(now, sums[0]);
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c)
      for (auto& row : sums[c])
        for (auto& sum : row) sum = _mm512_setzero_si512();
    for (int64_t k = start; k < end; k += kInputs, packed += kWidth * 4) {
      if constexpr (Rows >= kAheadRows)
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) __builtin_prefetch(packed + kAhead + 64 * j);
      __m512i words[Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) words[j] = _mm512_loadu_si512(packed + 64 * j);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        __m512i codes[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j)
          codes[j] = _mm512_and_si512(_mm512_srli_epi32(words[j], Bits * part), mask);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m512i x = broadcast(q + r * q_stride + k + 4 * part);
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) {
            __m512i& sum = sums[part % kChains][r][j];
            sum = _mm512_dpbusd_epi32(sum, codes[j], x);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        __m512i sum = sums[0][r][j];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) sum = _mm512_add_epi32(sum, sums[c][r][j]);
        fold(sum, now.scales + 16 * j, y + r * kWidth + 16 * j);
      }
    // GCC would keep a copy of y on the stack, and store all of it twice.
    __asm__ volatile("" : : : "memory");
    now.scales += kWidth;
    if (now.zeros != nullptr) now.zeros += kWidth;
    ++now.shifts;
  }
}

template <int Bits, int Vectors>
Block direct_of(int rows) {
  constexpr Block all[kPackedDirectRows] = {
      multiply_direct<Bits, 1, Vectors>, multiply_direct<Bits, 2, Vectors>,
      multiply_direct<Bits, 3, Vectors>, multiply_direct<Bits, 4, Vectors>,
      multiply_direct<Bits, 5, Vectors>, multiply_direct<Bits, 6, Vectors>,
      multiply_direct<Bits, 7, Vectors>, multiply_direct<Bits, 8, Vectors>};
  return all[rows - 1];
}

void multiply_packed(int bits, const int8_t* q, int64_t q_stride, const uint8_t* packed, int width,
                     int64_t depth, int64_t group, int rows, const PackedGroups& groups, float* y) {
  const Block run = bits == 4 ? (width == 32 ? direct_of<4, 2>(rows) : direct_of<4, 1>(rows))
                              : (width == 32 ? direct_of<2, 2>(rows) : direct_of<2, 1>(rows));
  run(q, q_stride, packed, depth, group, groups, y);
}

void dequantize(const uint8_t* packed, int width, int64_t blocks, const float* scales,
                const uint8_t* zeros, int zero, float* panel) {
  const __m512 lane =
      _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  // The value of each code; with zero points what each column subtracts comes after it.
  const __m512 values = zeros == nullptr ? _mm512_sub_ps(lane, _mm512_set1_ps((float)zero)) : lane;
  for (int column = 0; column < width; column += 16) {
    const __m512 shift = zeros == nullptr ? _mm512_setzero_ps()
                                          : _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                                                _mm_loadu_si128((const __m128i*)(zeros + column))));
    const __m512 scale = _mm512_loadu_ps(scales + column);
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* from = packed + (b * width + column) * 4;
      // What is dequantized next time: the products in between give it time to come.
      __builtin_prefetch(from + blocks * width * 4, 0, 2);
      const __m512i words = _mm512_loadu_si512(from);
      // Byte i of a word has the codes of inputs i and 4 + i; the look-up reads 4 bits.
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const __m512i code = _mm512_srli_epi32(words, 8 * (k % 4) + 4 * (k / 4));
        const __m512 value = _mm512_sub_ps(_mm512_permutexvar_ps(code, values), shift);
        _mm512_storeu_ps(panel + (b * 8 + k) * width + column, _mm512_mul_ps(value, scale));
      }
    }
  }
}

template <int Rows, int Vectors>
void multiply_float_block(const float* x, int64_t x_stride, const float* panel, int64_t depth,
                          float* y) {
  __m512 sums[Rows][Vectors];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sums[r][j] = _mm512_loadu_ps(y + (r * Vectors + j) * 16);
  for (int64_t k = 0; k < depth; ++k, panel += Vectors * 16) {
    __m512 w[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) w[j] = _mm512_loadu_ps(panel + j * 16);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const __m512 value = _mm512_set1_ps(x[r * x_stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sums[r][j] = _mm512_fmadd_ps(value, w[j], sums[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(y + (r * Vectors + j) * 16, sums[r][j]);
}

using FloatBlock = void (*)(const float*, int64_t, const float*, int64_t, float*);

template <int Vectors>
FloatBlock float_block_of(int rows) {
  constexpr FloatBlock blocks[kPackedRows] = {
      multiply_float_block<1, Vectors>, multiply_float_block<2, Vectors>,
      multiply_float_block<3, Vectors>, multiply_float_block<4, Vectors>,
      multiply_float_block<5, Vectors>, multiply_float_block<6, Vectors>};
  return blocks[rows - 1];
}

void multiply_float(const float* x, int64_t x_stride, const float* panel, int width, int64_t depth,
                    int rows, float* y) {
  const FloatBlock block = width == 32 ? float_block_of<2>(rows) : float_block_of<1>(rows);
  block(x, x_stride, panel, depth, y);
}

}  // namespace

const PackedProducts& packed_products_avx512() {
  static const PackedProducts products = {"avx512_vnni",   sum_groups, unpack,        multiply,
                                          multiply_packed, dequantize, multiply_float};
  return products;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
