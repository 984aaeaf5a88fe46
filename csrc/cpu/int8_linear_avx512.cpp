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

#include "int8_linear.h"

namespace compressops::cpu {
namespace {

// Rows × Panels accumulators stay in registers over the whole depth: 6 × 4 of the 32, with 4 for
// the weights, so that every weight load serves 6 products and every broadcast 4.
template <int Rows, int Panels>
void multiply_block(const uint8_t* q, int64_t q_stride, const int8_t* weight, int64_t k_blocks,
                    int32_t* accumulators) {
  const int64_t panel_stride = k_blocks * kColumns * kDepth;
  __m512i sums[Rows][Panels];
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) sums[m][p] = _mm512_setzero_si512();
  for (int64_t b = 0; b < k_blocks; ++b) {
    __m512i w[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
      w[p] = _mm512_loadu_si512(weight + p * panel_stride + b * kColumns * kDepth);
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) {
      int four;
      __builtin_memcpy(&four, q + m * q_stride + b * kDepth, sizeof(four));
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) sums[m][p] = _mm512_dpbusd_epi32(sums[m][p], x, w[p]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
      _mm512_storeu_si512(accumulators + (m * Panels + p) * kColumns, sums[m][p]);
}

using Block = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);

template <int Panels>
Block block_of(int rows) {
  constexpr Block blocks[kMaxRows] = {multiply_block<1, Panels>, multiply_block<2, Panels>,
                                      multiply_block<3, Panels>, multiply_block<4, Panels>,
                                      multiply_block<5, Panels>, multiply_block<6, Panels>};
  return blocks[rows - 1];
}

void multiply(const uint8_t* q, int64_t q_stride, const int8_t* panels_start, int64_t k_blocks,
              int rows, int panels, int32_t* accumulators) {
  const Block block = panels == 4   ? block_of<4>(rows)
                      : panels == 3 ? block_of<3>(rows)
                      : panels == 2 ? block_of<2>(rows)
                                    : block_of<1>(rows);
  block(q, q_stride, panels_start, k_blocks, accumulators);
}

void finish(const int32_t* sums, int64_t columns, const Int8Row& row, const int32_t* weight_sums,
            const float* scales, const float* bias, bool relu, float* y) {
  const __m512i zero = _mm512_set1_epi32(row.x_zero);
  const __m512 x_scale = _mm512_set1_ps(row.x_scale), none = _mm512_setzero_ps();
  for (int64_t n = 0; n < columns; n += 16) {
    const __mmask16 lanes = columns - n >= 16 ? 0xffff : (__mmask16)((1u << (columns - n)) - 1);
    const __m512i shift =
        _mm512_mullo_epi32(zero, _mm512_maskz_loadu_epi32(lanes, weight_sums + n));
    const __m512i exact = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(lanes, sums + n), shift);
    const __m512 scale = _mm512_mul_ps(x_scale, _mm512_maskz_loadu_ps(lanes, scales + n));
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale);
    if (bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, bias + n));
    // Not max, which would lose NaN.
    if (relu) value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, none, _CMP_LT_OQ), none);
    _mm512_mask_storeu_ps(y + n, lanes, value);
  }
}

}  // namespace

const Int8LinearKernels& int8_linear_avx512() {
  static const Int8LinearKernels kernels = {"avx512_vnni", multiply, finish};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
