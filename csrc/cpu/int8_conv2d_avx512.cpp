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
#include <stdint.h>
#include <string.h>

#include "int8_conv2d.h"

namespace compressops::cpu {
namespace {

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void range(const float* x, int64_t count, ConvRange* range) {
  // Positive floats order as their bits do, and negative ones are negative integers.
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  __m512i high[4] = {}, low[4] = {};
  for (int64_t i = 0; i < count; i += 64)
    for (int j = 0; j < 4; ++j) {
      const int64_t rest = count - i - 16 * j;
      if (rest <= 0) break;
      const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(rest), x + i + 16 * j);
      high[j] = _mm512_max_epi32(high[j], bits);
      low[j] = _mm512_max_epi32(low[j], _mm512_xor_si512(bits, sign));
    }
  for (int j = 1; j < 4; ++j) {
    high[0] = _mm512_max_epi32(high[0], high[j]);
    low[0] = _mm512_max_epi32(low[0], low[j]);
  }
  const int32_t h = _mm512_reduce_max_epi32(high[0]), l = _mm512_reduce_max_epi32(low[0]);
  range->high = h > range->high ? h : range->high;
  range->low = l > range->low ? l : range->low;
}

// 16 values to the nearest integers. What is far below becomes the smallest there is, as it should.
inline __m512i rounded(__m512 x, __m512 inverse) {
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_mul_ps(x, inverse), _mm512_set1_ps(1000.0f)));
}

// 4 times 16 integers, plus an offset, to bytes; of each lane of 128 bits first those of a.
inline __m512i bytes_of(__m512i a, __m512i b, __m512i c, __m512i d, __m512i offset) {
  return _mm512_packus_epi16(_mm512_adds_epi16(_mm512_packs_epi32(a, b), offset),
                             _mm512_adds_epi16(_mm512_packs_epi32(c, d), offset));
}

void quantize_pixels(const float* x, int64_t pixel, int64_t channels, int64_t pixels,
                     ConvQuantization to, uint8_t* codes, int64_t pixel_bytes) {
  if (pixel == channels && pixel_bytes == channels) {
    channels *= pixels;
    pixels = 1;
  }
  const __m512 inverse = _mm512_set1_ps(to.inverse);
  const __m512i offset = _mm512_set1_epi16((short)to.offset), zero = _mm512_setzero_si512();
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t p = 0; p < pixels; ++p, x += pixel, codes += pixel_bytes) {
    int64_t c = 0;
    for (; c + 64 <= channels; c += 64) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = rounded(_mm512_loadu_ps(x + c + 16 * i), inverse);
      _mm512_storeu_si512(
          codes + c, _mm512_permutexvar_epi32(order, bytes_of(v[0], v[1], v[2], v[3], offset)));
    }
    for (; c < channels; c += 16) {
      const __mmask16 lanes = first_lanes(channels - c);
      const __m512i v = rounded(_mm512_maskz_loadu_ps(lanes, x + c), inverse);
      const __m512i bytes = _mm512_permutexvar_epi32(order, bytes_of(v, zero, zero, zero, offset));
      _mm_mask_storeu_epi8(codes + c, lanes, _mm512_castsi512_si128(bytes));
    }
  }
}

// 16 pixels of up to 16 channels in registers: bytes are packed by 4 channels, and these then by 4.
void quantize_planes(const float* x, int64_t plane, int64_t channels, int64_t pixels,
                     ConvQuantization to, uint8_t* codes, int64_t pixel_bytes) {
  const __m512 inverse = _mm512_set1_ps(to.inverse);
  const __m512i offset = _mm512_set1_epi16((short)to.offset);
  const __m512i transpose =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  alignas(64) uint8_t tile[4][4][16];  // pixel 4 · b + a is at [a][b]
  for (int64_t c = 0; c < channels; c += 16) {
    const int64_t bytes = least(16, (channels - c + 3) / 4 * 4);
    for (int64_t p = 0; p < pixels; p += 16) {
      const __mmask16 lanes = first_lanes(pixels - p);
      __m512i quads[4] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (c + 4 * i >= channels) break;
        __m512i v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          // Behind the last channel: any, as weights are 0 there.
          const int64_t channel = least(c + 4 * i + j, channels - 1);
          v[j] = rounded(_mm512_maskz_loadu_ps(lanes, x + channel * plane + p), inverse);
        }
        quads[i] = _mm512_shuffle_epi8(bytes_of(v[0], v[1], v[2], v[3], offset), transpose);
      }
      uint8_t* at = codes + p * pixel_bytes + c;
      if (pixel_bytes == 4) {
        _mm512_mask_storeu_epi32(at, lanes, quads[0]);
        continue;
      }
      const __m512i a = _mm512_unpacklo_epi32(quads[0], quads[1]);
      const __m512i b = _mm512_unpackhi_epi32(quads[0], quads[1]);
      const __m512i d = _mm512_unpacklo_epi32(quads[2], quads[3]);
      const __m512i e = _mm512_unpackhi_epi32(quads[2], quads[3]);
      _mm512_store_si512(tile[0], _mm512_unpacklo_epi64(a, d));
      _mm512_store_si512(tile[1], _mm512_unpackhi_epi64(a, d));
      _mm512_store_si512(tile[2], _mm512_unpacklo_epi64(b, e));
      _mm512_store_si512(tile[3], _mm512_unpackhi_epi64(b, e));
      const int64_t count = least(16, pixels - p);
      if (bytes == 16)
        for (int64_t i = 0; i < count; ++i) memcpy(at + i * pixel_bytes, tile[i % 4][i / 4], 16);
      else
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = 0; k < bytes; k += 4)
            memcpy(at + i * pixel_bytes + k, tile[i % 4][i / 4] + k, 4);
    }
  }
}

// Rows × Panels sums stay in registers over all runs: 6 × 4 of the 32, with 4 for the weights, so
// that every weight load serves 6 products and every broadcast 4.
template <int Rows, int Panels>
void multiply_block(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
                    const int8_t* weight, int64_t panel_bytes, int32_t* sums, int64_t sums_stride) {
  __m512i totals[Rows][Panels];
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) totals[m][p] = _mm512_setzero_si512();
  for (int64_t i = 0; i < run_count; ++i) {
    const uint8_t* x[Rows];
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) x[m] = pixels[m] + runs[i].offset;
    const int64_t bytes = runs[i].blocks * kConvDepth;
    for (int64_t b = 0; b < bytes; b += kConvDepth, weight += kConvColumns * kConvDepth) {
      __m512i w[Panels];
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) w[p] = _mm512_loadu_si512(weight + p * panel_bytes);
#pragma GCC unroll 6
      for (int m = 0; m < Rows; ++m) {
        int four;
        __builtin_memcpy(&four, x[m] + b, sizeof(four));
        const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p)
          totals[m][p] = _mm512_dpbusd_epi32(totals[m][p], codes, w[p]);
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
      _mm512_storeu_si512(sums + m * sums_stride + p * kConvColumns, totals[m][p]);
}

using Block = void (*)(const uint8_t* const*, const ConvRun*, int64_t, const int8_t*, int64_t,
                       int32_t*, int64_t);

template <int Panels>
constexpr Block kBlocks[kConvRows] = {multiply_block<1, Panels>, multiply_block<2, Panels>,
                                      multiply_block<3, Panels>, multiply_block<4, Panels>,
                                      multiply_block<5, Panels>, multiply_block<6, Panels>};

void multiply(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
              const int8_t* weight, int64_t panel_bytes, int rows, int panels, int32_t* sums,
              int64_t sums_stride) {
  const Block block = panels == 4   ? kBlocks<4>[rows - 1]
                      : panels == 3 ? kBlocks<3>[rows - 1]
                      : panels == 2 ? kBlocks<2>[rows - 1]
                                    : kBlocks<1>[rows - 1];
  block(pixels, runs, run_count, weight, panel_bytes, sums, sums_stride);
}

// A channel a lane: of the 4 products of a lane one counts, but a load and the product are all that
// a position takes.
void multiply_depthwise(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
                        const int8_t* weight, int rows, int32_t* sums, int64_t sums_stride) {
  const uint8_t* x[kConvRows];
  for (int m = 0; m < kConvRows; ++m) x[m] = pixels[m < rows ? m : 0];
  __m512i totals[kConvRows] = {};
  for (int64_t t = 0; t < run_count; ++t) {
    const __m512i w = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(weight + 16 * t)));
#pragma GCC unroll 6
    for (int m = 0; m < kConvRows; ++m) {
      const __m128i codes = _mm_loadu_si128((const __m128i*)(x[m] + runs[t].offset));
      totals[m] = _mm512_dpbusd_epi32(totals[m], _mm512_cvtepu8_epi32(codes), w);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kConvRows; ++m)
    if (m < rows) _mm512_storeu_si512(sums + m * sums_stride, totals[m]);
}

// The transpose of 16 × 16 floats.
inline void transpose(__m512 (&rows)[16]) {
  __m512 t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    const __m512 b = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]);
    const __m512 d = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  // t[4 a + b] holds in its 128-bit lane L the rows 4 a … 4 a + 3 of column 4 L + b.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512 low = _mm512_shuffle_f32x4(t[b], t[4 + b], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(t[b], t[4 + b], 0xdd);
    const __m512 high = _mm512_shuffle_f32x4(t[8 + b], t[12 + b], 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(t[8 + b], t[12 + b], 0xdd);
    rows[b] = _mm512_shuffle_f32x4(low, high, 0x88);
    rows[4 + b] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[8 + b] = _mm512_shuffle_f32x4(low, high, 0xdd);
    rows[12 + b] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
}

void finish(const int32_t* sums, int64_t sums_stride, int64_t pixels, int64_t columns,
            const ConvOutput& output, float* out, int64_t pixel_stride, int64_t channel_stride) {
  const __m512 floor = _mm512_set1_ps(output.relu ? 0.0f : -__builtin_inff());
  for (int64_t n = 0; n < columns; n += 16) {
    const __mmask16 lanes = first_lanes(columns - n);
    const __m512i shift = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(lanes, output.sums + n),
                                             _mm512_set1_epi32(output.offset));
    const __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, output.scales + n),
                                       _mm512_set1_ps(output.x_scale));
    // -0 changes no sum.
    const __m512 bias = output.bias == nullptr ? _mm512_set1_ps(-0.0f)
                                               : _mm512_maskz_loadu_ps(lanes, output.bias + n);
    const auto row = [&](int64_t m) __attribute__((always_inline)) {
      const __m512i sum = _mm512_loadu_si512(sums + m * sums_stride + n);
      const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift)), scale);
      // The maximum is its second operand where one is NaN.
      return _mm512_max_ps(floor, _mm512_add_ps(y, bias));
    };
    if (channel_stride == 1) {
      for (int64_t m = 0; m < pixels; ++m)
        _mm512_mask_storeu_ps(out + m * pixel_stride + n, lanes, row(m));
      continue;
    }
    for (int64_t m = 0; m < pixels; m += 16) {
      __m512 block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = row(least(m + i, pixels - 1));
      transpose(block);
      const __mmask16 valid = first_lanes(pixels - m);
      float* to = out + n * channel_stride + m;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (n + i < columns) _mm512_mask_storeu_ps(to + i * channel_stride, valid, block[i]);
    }
  }
}

}  // namespace

const Int8Conv2dKernels& int8_conv2d_avx512() {
  static constexpr Int8Conv2dKernels kernels = {
      "avx512_vnni", range, quantize_planes, quantize_pixels, multiply, multiply_depthwise, finish};
  return kernels;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
