// The transforms of winograd_conv2d, on registers. compressops/ops/winograd_transform.py derives
// the matrices; these are their common subexpressions.
#pragma once

#include "device.cuh"

namespace compressops {

// Interpolation is at 0, ±point(j) and infinity. kAlpha = 1: no transform.
template <int kAlpha>
__host__ __device__ constexpr float winograd_point(int j) {
  if (kAlpha == 6) return j == 0 ? 0.625f : 1.5f;
  return j == 0 ? 1.0f : j == 1 ? 2.0f : 0.5f;
}

// The most outputs of a tile: those of the kernel of 3.
template <int kAlpha>
constexpr int kMaxTile = kAlpha == 1 ? 1 : kAlpha - 2;

// of[i][j] = point(j)^i, a table because compilers leave a function of an unrolled index a loop.
template <int kAlpha>
struct WinogradPowers {
  float of[kMaxTile<kAlpha>][3] = {};

  __host__ __device__ constexpr WinogradPowers() {
    for (int j = 0; j < 3; ++j) {
      float value = 1.0f;
      for (int i = 0; i < kMaxTile<kAlpha>; ++i) {
        of[i][j] = value;
        value *= winograd_point<kAlpha>(j);
      }
    }
  }
};

// v = Bᵀ d. Each pair of points ±p shares an even and an odd half.
template <int kAlpha>
__device__ __forceinline__ void winograd_bt(const float (&d)[kAlpha], float (&v)[kAlpha]) {
  static_assert(kAlpha == 1 || kAlpha == 4 || kAlpha == 6 || kAlpha == 8);
  if constexpr (kAlpha == 1) {
    v[0] = d[0];
  } else if constexpr (kAlpha == 4) {
    v[0] = d[0] - d[2];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  } else if constexpr (kAlpha == 6) {
    constexpr float p = winograd_point<6>(0), q = winograd_point<6>(1);
    const float even_p = d[4] - q * q * d[2], odd_p = p * (d[3] - q * q * d[1]);
    const float even_q = d[4] - p * p * d[2], odd_q = q * (d[3] - p * p * d[1]);
    v[0] = p * p * q * q * d[0] + (d[4] - (p * p + q * q) * d[2]);
    v[1] = even_p + odd_p;
    v[2] = even_p - odd_p;
    v[3] = even_q + odd_q;
    v[4] = even_q - odd_q;
    v[5] = p * p * q * q * d[1] + (d[5] - (p * p + q * q) * d[3]);
  } else {
    const float even1 = d[2] + d[6] - 4.25f * d[4], odd1 = d[1] + d[5] - 4.25f * d[3];
    const float even2 = d[6] + 0.25f * d[2] - 1.25f * d[4];
    const float odd2 = 0.5f * d[1] - 2.5f * d[3] + 2.0f * d[5];
    const float even3 = d[6] + 4.0f * d[2] - 5.0f * d[4];
    const float odd3 = 2.0f * d[1] - 2.5f * d[3] + 0.5f * d[5];
    v[0] = d[0] - d[6] + 5.25f * (d[4] - d[2]);
    v[1] = even1 + odd1;
    v[2] = even1 - odd1;
    v[3] = even2 + odd2;
    v[4] = even2 - odd2;
    v[5] = even3 + odd3;
    v[6] = even3 - odd3;
    v[7] = d[7] - d[1] + 5.25f * (d[3] - d[5]);
  }
}

// y = Aᵀ m for a tile of `tile` outputs; the others of y are of no use. The point at infinity
// counts for the last output alone: only there does the matrix depend on the tile.
template <int kAlpha>
__device__ __forceinline__ void winograd_at(const float (&m)[kAlpha], int tile,
                                            float (&y)[kMaxTile<kAlpha>]) {
  if constexpr (kAlpha == 1) {
    y[0] = m[0];
  } else {
    constexpr int kPairs = kAlpha / 2 - 1;
    constexpr WinogradPowers<kAlpha> kPowers;
    float sums[kPairs], differences[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      sums[j] = m[1 + 2 * j] + m[2 + 2 * j];
      differences[j] = m[1 + 2 * j] - m[2 + 2 * j];
    }
    // The published matrices of alpha = 4 carry the sign of the point at infinity here.
    const float at_infinity = kAlpha == 4 ? -m[kAlpha - 1] : m[kAlpha - 1];
#pragma unroll
    for (int i = 0; i < kMaxTile<kAlpha>; ++i) {
      float value = i == 0 ? m[0] : 0.0f;
      // Tiles are even, and that of alpha = 4 is 2.
      if (i % 2 == 1) value = kAlpha == 4 || i + 1 == tile ? at_infinity : 0.0f;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        value += kPowers.of[i][j] * (i % 2 ? differences[j] : sums[j]);
      }
      y[i] = value;
    }
  }
}

// Bᵀ d B of the channels of a word; `put(row, words)` takes each row of positions in turn.
template <class T, int kAlphaH, int kAlphaW, class Put>
__device__ __forceinline__ void winograd_transform_input(const uint32_t (&d)[kAlphaH][kAlphaW],
                                                         Put&& put) {
  float half[kPerWord<T>][kAlphaH][kAlphaW];
#pragma unroll
  for (int j = 0; j < kAlphaW; ++j) {
#pragma unroll
    for (int s = 0; s < kPerWord<T>; ++s) {
      float column[kAlphaH], transformed[kAlphaH];
#pragma unroll
      for (int i = 0; i < kAlphaH; ++i) column[i] = word_element<T>(d[i][j], s);
      winograd_bt<kAlphaH>(column, transformed);
#pragma unroll
      for (int i = 0; i < kAlphaH; ++i) half[s][i][j] = transformed[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kAlphaH; ++i) {
    float rows[kPerWord<T>][kAlphaW];
#pragma unroll
    for (int s = 0; s < kPerWord<T>; ++s) winograd_bt<kAlphaW>(half[s][i], rows[s]);
    uint32_t words[kAlphaW];
#pragma unroll
    for (int j = 0; j < kAlphaW; ++j) {
      float values[kPerWord<T>];
#pragma unroll
      for (int s = 0; s < kPerWord<T>; ++s) values[s] = rows[s][j];
      words[j] = pack_word<T>(values);
    }
    put(i, words);
  }
}

// Aᵀ m A of kCount matrices side by side. `get(column, m)` gives a column of positions of each,
// `put(row, y)` takes a row of outputs of each.
template <int kCount, int kAlphaH, int kAlphaW, class Get, class Put>
__device__ __forceinline__ void winograd_transform_output(int tile_h, int tile_w, Get&& get,
                                                          Put&& put) {
  float half[kCount][kMaxTile<kAlphaH>][kAlphaW];
#pragma unroll
  for (int j = 0; j < kAlphaW; ++j) {
    float column[kCount][kAlphaH];
    get(j, column);
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      float transformed[kMaxTile<kAlphaH>];
      winograd_at<kAlphaH>(column[s], tile_h, transformed);
#pragma unroll
      for (int i = 0; i < kMaxTile<kAlphaH>; ++i) half[s][i][j] = transformed[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxTile<kAlphaH>; ++i) {
    if (i >= tile_h) break;
    float rows[kCount][kMaxTile<kAlphaW>];
#pragma unroll
    for (int s = 0; s < kCount; ++s) winograd_at<kAlphaW>(half[s][i], tile_w, rows[s]);
    put(i, rows);
  }
}

}  // namespace compressops
