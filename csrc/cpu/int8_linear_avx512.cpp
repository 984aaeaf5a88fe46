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
#include <math.h>

#include "int8_linear.h"

namespace compressops::cpu {
namespace {

__mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

float quantize_row(const float* x, uint8_t* q, int64_t K) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(K - k), x + k);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
  }
  const uint32_t top = _mm512_reduce_max_epu32(largest);
  const bool finite = top < 0x7f800000u;
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)top)));
  const float inverse = finite && amax > 0.0f ? 127.0f / amax : 0.0f;

  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512 high = _mm512_set1_ps(127.0f);
  const __m512 low = _mm512_set1_ps(-127.0f);
  const int64_t padded = (K + kDepth - 1) / kDepth * kDepth;
  for (int64_t k = 0; k < padded; k += 16) {
    const __mmask16 lanes = finite ? first_lanes(K - k > 0 ? K - k : 0) : (__mmask16)0;
    __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), scale);
    // 0 · Inf, where amax is subnormal, is NaN: zero it as the other kernels do.
    scaled = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q), scaled);
    scaled = _mm512_max_ps(low, _mm512_min_ps(high, scaled));
    const __m512i codes = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
    _mm_mask_storeu_epi8(q + k, first_lanes(padded - k), _mm512_cvtepi32_epi8(codes));
  }
  return finite ? amax / 127.0f : NAN;
}

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
  static const Int8LinearKernels kernels = {"avx512_vnni", quantize_row, multiply};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
