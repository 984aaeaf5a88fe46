#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prfchw"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prfchw")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <math.h>

#include "int8_linear.h"

namespace compressops::cpu {
namespace {

// How far ahead of its use a weight is fetched, by blocks that have the time: the first to pass
// over a panel would wait for it otherwise. With fewer rows the caches' bandwidth is the limit.
constexpr int64_t kAhead = 2048;
constexpr int kAheadRows = 4;

// Rows × Panels accumulators stay in registers over the whole depth: 6 × 4 or 8 × 3 of the 32, with
// Panels for the weights, so that every weight load serves 6 products and every broadcast 4.
template <int Rows, int Panels>
void multiply_block(const Int8Block& block) {
  const uint8_t* q = block.q;
  const int8_t* weight = block.panels;
  const int64_t q_stride = block.q_stride, panel_stride = block.k_blocks * kColumns * kDepth;
  __mmask16 lanes[Panels];
  __m512i sums[Rows][Panels];
#pragma GCC unroll 4
  for (int p = 0; p < Panels; ++p) {
    const int64_t rest = block.columns - p * kColumns;
    lanes[p] = rest >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << rest) - 1);
    const __m512i weight_sums = _mm512_maskz_loadu_epi32(lanes[p], block.weight_sums + 16 * p);
    // What the codes of 0.0 contribute is taken off first.
    const __m512i shift = _mm512_mullo_epi32(weight_sums, _mm512_set1_epi32(-block.rows[0].zero));
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) sums[m][p] = shift;
    if (!block.one_zero)
#pragma GCC unroll 8
      for (int m = 1; m < Rows; ++m)
        sums[m][p] = _mm512_mullo_epi32(weight_sums, _mm512_set1_epi32(-block.rows[m].zero));
  }
  // The products give the lines of the result time to come.
  for (int m = 0; m < Rows; ++m)
    for (int p = 0; p < Panels; ++p) __builtin_prefetch(block.y + m * block.y_stride + 16 * p, 1);
  for (int64_t b = 0; b < block.k_blocks; ++b) {
    __m512i w[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const int8_t* from = weight + p * panel_stride + b * kColumns * kDepth;
      w[p] = _mm512_loadu_si512(from);
      if constexpr (Rows >= kAheadRows) __builtin_prefetch(from + kAhead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      int four;
      __builtin_memcpy(&four, q + m * q_stride + b * kDepth, sizeof(four));
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) sums[m][p] = _mm512_dpbusd_epi32(sums[m][p], x, w[p]);
    }
  }
  // Through memory: GCC would keep the sums there all along if what follows read them.
  alignas(64) int32_t stored[Rows][Panels][16];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) _mm512_store_si512(stored[m][p], sums[m][p]);
  const __m512 least = _mm512_set1_ps(block.relu ? 0.0f : -INFINITY);
  for (int p = 0; p < Panels; ++p) {
    const __m512 scales = _mm512_maskz_loadu_ps(lanes[p], block.scales + 16 * p);
    const __m512 bias = block.bias == nullptr
                            ? _mm512_setzero_ps()
                            : _mm512_maskz_loadu_ps(lanes[p], block.bias + 16 * p);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(block.rows[m].scale), scales);
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_load_si512(stored[m][p]));
      // Of a NaN and a number, max gives its second operand.
      const __m512 value = _mm512_max_ps(least, _mm512_fmadd_ps(exact, scale, bias));
      float* y = block.y + m * block.y_stride + 16 * p;
      if (lanes[p] == 0xffff) {
        _mm512_storeu_ps(y, value);
      } else {
        _mm512_mask_storeu_ps(y, lanes[p], value);
      }
    }
  }
}

using Multiply = void (*)(const Int8Block&);

template <int Panels>
Multiply block_of(int rows) {
  constexpr Multiply blocks[] = {multiply_block<1, Panels>, multiply_block<2, Panels>,
                                 multiply_block<3, Panels>, multiply_block<4, Panels>,
                                 multiply_block<5, Panels>, multiply_block<6, Panels>};
  if constexpr (Panels <= kTallTile.panels) {
    if (rows == 7) return multiply_block<7, Panels>;
    if (rows == 8) return multiply_block<8, Panels>;
  }
  return blocks[rows - 1];
}

void multiply(const Int8Block& block) {
  const int panels = block.panel_count;
  const Multiply run = panels == 4   ? block_of<4>(block.count)
                       : panels == 3 ? block_of<3>(block.count)
                       : panels == 2 ? block_of<2>(block.count)
                                     : block_of<1>(block.count);
  run(block);
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
