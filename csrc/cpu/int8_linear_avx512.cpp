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

}  // namespace

const Int8LinearKernels& int8_linear_avx512() {
  static const Int8LinearKernels kernels = {"avx512_vnni", multiply};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
