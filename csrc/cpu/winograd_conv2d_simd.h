// The body of winograd_conv2d's kernels, written once over vectors of kLanes floats. Included by
// one translation unit per instruction set, inside its anonymous namespace, after that set's simd
// header and
//   kRegisterRows   rows of the largest register block of `multiply`

constexpr int kParts = kBlock / kLanes;  // vectors in a block of 16 channels

#include "winograd_conv2d_window.h"

// ---- transforms ------------------------------------------------------------------------------

// The interpolation points are 0, ±kPoints and ∞. Those of alpha = 6 are not the ±1, ±2 of the
// literature: near 1, and their product too, they lose about half as many bits.
template <int kAlpha>
constexpr float kPoints[3] = {1.0f, 2.0f, 0.5f};
template <>
constexpr float kPoints<6>[3] = {0.625f, 1.5f, 0.0f};

// Bᵀ d. Each pair of points shares an even and an odd half.
template <int kAlpha>
inline void apply_bt(const Vec* d, Vec* v) {
  if constexpr (kAlpha == 1) {
    v[0] = d[0];
  } else if constexpr (kAlpha == 4) {
    v[0] = d[0] - d[2];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  } else if constexpr (kAlpha == 6) {
    constexpr float p = kPoints<6>[0], q = kPoints<6>[1];
    const Vec even_p = d[4] - (q * q) * d[2], odd_p = d[3] - (q * q) * d[1];
    const Vec even_q = d[4] - (p * p) * d[2], odd_q = d[3] - (p * p) * d[1];
    v[0] = (p * p * q * q) * d[0] + (d[4] - (p * p + q * q) * d[2]);
    v[1] = even_p + p * odd_p;
    v[2] = even_p - p * odd_p;
    v[3] = even_q + q * odd_q;
    v[4] = even_q - q * odd_q;
    v[5] = (p * p * q * q) * d[1] + (d[5] - (p * p + q * q) * d[3]);
  } else {
    const Vec even1 = d[2] + d[6] - 4.25f * d[4], odd1 = d[1] + d[5] - 4.25f * d[3];
    const Vec even2 = d[6] + 0.25f * d[2] - 1.25f * d[4];
    const Vec odd2 = 0.5f * d[1] - 2.5f * d[3] + 2.0f * d[5];
    const Vec even3 = d[6] + 4.0f * d[2] - 5.0f * d[4];
    const Vec odd3 = 2.0f * d[1] - 2.5f * d[3] + 0.5f * d[5];
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

constexpr float power(float base, int exponent) {
  float out = 1.0f;
  for (int i = 0; i < exponent; ++i) out *= base;
  return out;
}

// Aᵀ m: y[i] = Σ p^i · m over the points p; the point at infinity counts for the last row alone.
template <int kAlpha, int kTile>
inline void apply_at(const Vec* m, Vec* y) {
  if constexpr (kAlpha == 1) {
    y[0] = m[0];
  } else {
    constexpr int kPairs = kAlpha / 2 - 1;
    Vec sum[kPairs], difference[kPairs];
#pragma GCC unroll 3
    for (int j = 0; j < kPairs; ++j) {
      sum[j] = m[1 + 2 * j] + m[2 + 2 * j];
      difference[j] = m[1 + 2 * j] - m[2 + 2 * j];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) {
      const Vec* parts = i % 2 ? difference : sum;
      Vec value = power(kPoints<kAlpha>[0], i) * parts[0];
#pragma GCC unroll 3
      for (int j = 1; j < kPairs; ++j) value += power(kPoints<kAlpha>[j], i) * parts[j];
      if (i == 0) value += m[0];
      // The published matrices of alpha = 4 carry the sign of the point at infinity here.
      if (i == kTile - 1) value += kAlpha == 4 ? -m[kAlpha - 1] : m[kAlpha - 1];
      y[i] = value;
    }
  }
}

// A y, the transpose of apply_at.
template <int kAlpha, int kTile>
inline void apply_a(const Vec* y, Vec* m) {
  if constexpr (kAlpha == 1) {
    m[0] = y[0];
  } else {
    m[0] = y[0];
#pragma GCC unroll 3
    for (int j = 0; j < kAlpha / 2 - 1; ++j) {
      Vec even = y[0], odd = kPoints<kAlpha>[j] * y[1];
#pragma GCC unroll 6
      for (int i = 2; i < kTile; ++i) (i % 2 ? odd : even) += power(kPoints<kAlpha>[j], i) * y[i];
      m[1 + 2 * j] = even + odd;
      m[2 + 2 * j] = even - odd;
    }
    m[kAlpha - 1] = kAlpha == 4 ? -y[kTile - 1] : y[kTile - 1];
  }
}

// The two ways in: kIn pixels to kAlpha values, by Bᵀ (kIn = alpha) or A (kIn = tile).
template <int kAlpha, int kIn>
inline void apply_in(const Vec* in, Vec* out) {
  if constexpr (kIn == kAlpha)
    apply_bt<kAlpha>(in, out);
  else
    apply_a<kAlpha, kIn>(in, out);
}

template <int kAlphaH, int kInH, int kAlpha, int kIn>
void transform_tiles_in(const float* window, int64_t row_stride, int64_t column_stride,
                        int64_t step, int64_t tiles, float* v, int64_t position_stride,
                        int64_t tile_stride) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int part = 0; part < kParts; ++part) {
      const float* d = window + tile * step * column_stride + part * kLanes;
      float* to = v + tile * tile_stride + part * kLanes;
      Vec half[kAlphaH][kIn];
#pragma GCC unroll 1
      for (int column = 0; column < kIn; ++column) {
        Vec in[kInH], out[kAlphaH];
#pragma GCC unroll 8
        for (int row = 0; row < kInH; ++row)
          in[row] = load(d + row * row_stride + column * column_stride);
        apply_in<kAlphaH, kInH>(in, out);
#pragma GCC unroll 8
        for (int row = 0; row < kAlphaH; ++row) half[row][column] = out[row];
      }
#pragma GCC unroll 1
      for (int row = 0; row < kAlphaH; ++row) {
        Vec out[kAlpha];
        apply_in<kAlpha, kIn>(half[row], out);
#pragma GCC unroll 8
        for (int column = 0; column < kAlpha; ++column)
          store(to + (row * kAlpha + column) * position_stride, out[column]);
      }
    }
  }
}

template <int kAlphaH, int kTileH, int kAlpha, int kTile>
void transform_output_tiles(const float* m, int64_t position_stride, int64_t tile_stride,
                            int64_t tiles, const float* bias, bool relu, float* window,
                            int64_t row_stride, int64_t column_stride) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int part = 0; part < kParts; ++part) {
      const float* from = m + tile * tile_stride + part * kLanes;
      float* y = window + tile * kTile * column_stride + part * kLanes;
      Vec half[kTileH][kAlpha];
#pragma GCC unroll 1
      for (int column = 0; column < kAlpha; ++column) {
        Vec in[kAlphaH], out[kTileH];
#pragma GCC unroll 8
        for (int row = 0; row < kAlphaH; ++row)
          in[row] = load(from + (row * kAlpha + column) * position_stride);
        apply_at<kAlphaH, kTileH>(in, out);
#pragma GCC unroll 8
        for (int row = 0; row < kTileH; ++row) half[row][column] = out[row];
      }
      const Vec added = load(bias + part * kLanes);
#pragma GCC unroll 1
      for (int row = 0; row < kTileH; ++row) {
        Vec out[kTile];
        apply_at<kAlpha, kTile>(half[row], out);
#pragma GCC unroll 8
        for (int column = 0; column < kTile; ++column) {
          Vec value = out[column] + added;
          if (relu) value = value < 0.0f ? Vec{} : value;  // keeps NaN
          store(y + row * row_stride + column * column_stride, value);
        }
      }
    }
  }
}

template <int kAlpha, int kIn = kAlpha>
auto transform_in(bool one_dimensional) {
  return one_dimensional ? transform_tiles_in<1, 1, kAlpha, kIn>
                         : transform_tiles_in<kAlpha, kIn, kAlpha, kIn>;
}

void transform_input(int alpha, bool one_dimensional, const float* window, int64_t row_stride,
                     int64_t column_stride, int64_t step, int64_t tiles, float* v,
                     int64_t position_stride, int64_t tile_stride) {
  const auto run = alpha == 4   ? transform_in<4>(one_dimensional)
                   : alpha == 6 ? transform_in<6>(one_dimensional)
                                : transform_in<8>(one_dimensional);
  run(window, row_stride, column_stride, step, tiles, v, position_stride, tile_stride);
}

void transform_gradient(int alpha, int tile, bool one_dimensional, const float* window,
                        int64_t row_stride, int64_t column_stride, int64_t tiles, float* m,
                        int64_t position_stride, int64_t tile_stride) {
  const auto run = alpha == 4   ? transform_in<4, 2>(one_dimensional)
                   : alpha == 6 ? (tile == 4 ? transform_in<6, 4>(one_dimensional)
                                             : transform_in<6, 2>(one_dimensional))
                   : tile == 6  ? transform_in<8, 6>(one_dimensional)
                   : tile == 4  ? transform_in<8, 4>(one_dimensional)
                                : transform_in<8, 2>(one_dimensional);
  run(window, row_stride, column_stride, tile, tiles, m, position_stride, tile_stride);
}

template <int kAlpha, int kTile>
auto output_transform(bool one_dimensional) {
  return one_dimensional ? transform_output_tiles<1, 1, kAlpha, kTile>
                         : transform_output_tiles<kAlpha, kTile, kAlpha, kTile>;
}

void transform_output(int alpha, int tile, bool one_dimensional, const float* m,
                      int64_t position_stride, int64_t tile_stride, int64_t tiles,
                      const float* bias, bool relu, float* window, int64_t row_stride,
                      int64_t column_stride) {
  const auto run = alpha == 4   ? output_transform<4, 2>(one_dimensional)
                   : alpha == 6 ? (tile == 4 ? output_transform<6, 4>(one_dimensional)
                                             : output_transform<6, 2>(one_dimensional))
                   : tile == 6  ? output_transform<8, 6>(one_dimensional)
                   : tile == 4  ? output_transform<8, 4>(one_dimensional)
                                : output_transform<8, 2>(one_dimensional);
  run(m, position_stride, tile_stride, tiles, bias, relu, window, row_stride, column_stride);
}

// ---- products --------------------------------------------------------------------------------

// Products are summed in blocks of so many channels, and the blocks' sums then added. Direct
// convolution sums in blocks as well, and one sum over 512 channels has twice the error. Blocks of
// 64 have 0.7 of it and take 2 % longer.
constexpr int64_t kDepthBlock = 128;

// kRows × kVectors sums stay in registers over a block of the depth.
template <int kRows, int kVectors>
void multiply_block(const float* v, int64_t v_stride, const float* u, int64_t u_stride,
                    int64_t depth, float* m, int64_t m_stride) {
  for (int64_t start = 0; start == 0 || start < depth; start += kDepthBlock) {
    const int64_t end = start + kDepthBlock < depth ? start + kDepthBlock : depth;
    Vec sums[kRows][kVectors] = {};
    for (int64_t c = start; c < end; ++c) {
      Vec weights[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        weights[j] = load(u + c * u_stride + j * kLanes);
        // Weights come from L3 or memory, 4 KB ahead of their use.
        __builtin_prefetch(u + c * u_stride + j * kLanes + 1024);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const float value = v[t * v_stride + c];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sums[t][j] += value * weights[j];
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        float* to = m + t * m_stride + j * kLanes;
        store(to, start == 0 ? sums[t][j] : load(to) + sums[t][j]);
      }
    }
  }
}

template <int kVectors, int... I>
void multiply_rows(const float* v, int64_t v_stride, const float* u, int64_t u_stride,
                   int64_t depth, int64_t tiles, float* m, int64_t m_stride, Indices<I...>) {
  using Block = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
  constexpr Block kBlocks[] = {multiply_block<I + 1, kVectors>...};
  const int64_t blocks = (tiles + kRegisterRows - 1) / kRegisterRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * tiles / blocks, end = (block + 1) * tiles / blocks;
    kBlocks[end - first - 1](v + first * v_stride, v_stride, u, u_stride, depth,
                             m + first * m_stride, m_stride);
  }
}

void multiply(const float* v, int64_t v_stride, const float* u, int64_t width, int64_t depth,
              int64_t tiles, float* m, int64_t m_stride) {
  using Rows = typename UpTo<kRegisterRows>::type;
  if (width < 2 * kLanes)
    return multiply_rows<1>(v, v_stride, u, width, depth, tiles, m, m_stride, Rows());
  for (int64_t column = 0; column < width; column += 2 * kLanes)
    multiply_rows<2>(v, v_stride, u + column, width, depth, tiles, m + column, m_stride, Rows());
}

template <int kRows, int kVectors>
void multiply_transposed_block(const float* m, int64_t m_stride, const float* v, int64_t v_stride,
                               int64_t tiles, float* u, int64_t u_stride) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t t = 0; t < tiles; ++t) {
    Vec inputs[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) inputs[j] = load(v + t * v_stride + j * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kRows; ++k) {
      const float value = m[t * m_stride + k];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[k][j] += value * inputs[j];
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = u + k * u_stride + j * kLanes;
      store(to, load(to) + sums[k][j]);
    }
}

template <int kVectors, int... I>
void multiply_transposed_rows(const float* m, int64_t m_stride, const float* v, int64_t v_stride,
                              int64_t tiles, int64_t rows, float* u, int64_t u_stride,
                              Indices<I...>) {
  using Block = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
  constexpr Block kBlocks[] = {multiply_transposed_block<I + 1, kVectors>...};
  const int64_t blocks = (rows + kRegisterRows - 1) / kRegisterRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * rows / blocks, end = (block + 1) * rows / blocks;
    kBlocks[end - first - 1](m + first, m_stride, v, v_stride, tiles, u + first * u_stride,
                             u_stride);
  }
}

void multiply_transposed(const float* m, int64_t m_stride, const float* v, int64_t v_stride,
                         int64_t tiles, int64_t rows, int64_t width, float* u, int64_t u_stride) {
  using Rows = typename UpTo<kRegisterRows>::type;
  int64_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes)
    multiply_transposed_rows<2>(m, m_stride, v + column, v_stride, tiles, rows, u + column,
                                u_stride, Rows());
  for (; column < width; column += kLanes)
    multiply_transposed_rows<1>(m, m_stride, v + column, v_stride, tiles, rows, u + column,
                                u_stride, Rows());
}

constexpr WinogradConv2dKernels kernels(const char* isa) {
  return {isa,
          gather,
          scatter,
          transform_input,
          transform_output,
          transform_gradient,
          multiply,
          multiply_transposed};
}
