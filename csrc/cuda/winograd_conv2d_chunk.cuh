// The chunked way of winograd_conv2d, before and after the products: x to V and M to y.
#pragma once

#include <type_traits>

#include "winograd_conv2d_pixels.cuh"

namespace compressops {

// What M is stored in. Of 16-bit tensors float16, for half of float32's traffic: each of its blocks
// (a warp's in the product, up to 64 tiles of 64 channels) carries a power of two that brings its
// largest finite magnitude to [2^14, 2^15), so that nothing overflows. What is below 2^-28 of that
// magnitude may lose digits, and what is below 2^-39 become 0: bfloat16 itself has more range.
template <class T>
using WinogradProduct = std::conditional_t<kPerWord<T> == 1, float, __half>;

// The tiles and groups that are worked through together. V is [groups][P][tiles][v_words]; M is
// [groups][P][rows][m_words], where rows are tiles and columns are output channels if y has its
// channels last, else the other way round.
struct WinogradChunk {
  int64_t first_group, groups, first_tile, tiles;
  int64_t v_words, rows, columns, m_words;
  // Scales of M, [groups][P][scale_rows][scale_columns], of blocks of 2^log2 rows and columns.
  int row_log2, column_log2;
  int64_t scale_rows, scale_columns;
};

// A block's threads are laid over lines of words: as many lanes on a line as it has words, up to a
// warp, so that short lines leave no lane idle.
constexpr int kWinogradThreads = 256;

__host__ __device__ inline int winograd_lanes_log2(int64_t words) {
  int log2 = 0;
  while (log2 < 5 && (int64_t{1} << log2) < words) ++log2;
  return log2;
}

// Blocks for lines of words.
__host__ __device__ inline int64_t winograd_blocks(int64_t lines, int64_t words) {
  const int log2 = winograd_lanes_log2(words);
  return ceil_div<int64_t>(lines, kWinogradThreads >> log2) * ceil_div(words, int64_t{1} << log2);
}

struct WinogradPlace {
  int64_t group, line, word;

  __device__ __forceinline__ WinogradPlace(int64_t lines, int64_t words) {
    const int log2 = winograd_lanes_log2(words), thread = static_cast<int>(threadIdx.x);
    const int64_t across = ceil_div(words, int64_t{1} << log2);
    const int64_t down = ceil_div<int64_t>(lines, kWinogradThreads >> log2);
    const int64_t block = int64_t{blockIdx.x} / across;
    group = block / down;
    line = (block - group * down) * (kWinogradThreads >> log2) + (thread >> log2);
    word = ((int64_t{blockIdx.x} - block * across) << log2) + (thread & ((1 << log2) - 1));
  }
};

// V = Bᵀ d B where the channels of x are side by side: lanes take words of channels.
template <class T, int kAlphaH, int kAlphaW>
__global__ void __launch_bounds__(kWinogradThreads, 1)
    winograd_input_channels(WinogradArgs<T> args, WinogradChunk chunk, Global<uint32_t> v) {
  const WinogradPlace place(chunk.tiles, chunk.v_words);
  if (place.line >= chunk.tiles || place.word >= chunk.v_words) return;
  const WinogradWindow window(args.shape, args.x_strides, chunk.first_tile + place.line);
  uint32_t d[kAlphaH][kAlphaW];
  const int64_t C = args.shape.C, c = place.word * kPerWord<T>;
  winograd_load(args, window, ((chunk.first_group + place.group) * C + c) * args.x_strides.c, C - c,
                d);
  const int64_t position = chunk.tiles * chunk.v_words;
  Global<uint32_t> out =
      v + (place.group * kAlphaH * kAlphaW * position + place.line * chunk.v_words + place.word);
  winograd_transform_input<T>(d, [&](int, const uint32_t (&words)[kAlphaW]) {
#pragma unroll
    for (int j = 0; j < kAlphaW; ++j) {
      *out = words[j];
      out = out + position;
    }
  });
}

// The same where they are not: lanes take tiles side by side, and a row of positions goes through
// shared memory so that V is written in runs of 8 words.
constexpr int kWinogradRun = kWinogradThreads / kWarpSize;

template <class T, int kAlphaH, int kAlphaW>
__global__ void __launch_bounds__(kWinogradThreads, 1)
    winograd_input_tiles(WinogradArgs<T> args, WinogradChunk chunk, Global<uint32_t> v) {
  constexpr int kStride = kWinogradRun + 1;  // odd: a column of it lies in 32 banks
  COMPRESSOPS_SHARED_ARRAY(uint32_t, staged, kAlphaW * kWarpSize * kStride);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t across = ceil_div<int64_t>(chunk.v_words, kWinogradRun);
  const int64_t down = ceil_div<int64_t>(chunk.tiles, kWarpSize);
  const int64_t block = int64_t{blockIdx.x} / across, group = block / down;
  const int64_t first_word = (int64_t{blockIdx.x} - block * across) * kWinogradRun;
  const int64_t first_tile = (block - group * down) * kWarpSize;

  const WinogradWindow window(args.shape, args.x_strides, chunk.first_tile + first_tile + lane);
  uint32_t d[kAlphaH][kAlphaW];
  const int64_t C = args.shape.C, c = (first_word + warp) * kPerWord<T>;
  winograd_load(args, window, ((chunk.first_group + group) * C + c) * args.x_strides.c, C - c, d);

  const int64_t tile = first_tile + thread / kWinogradRun,
                word = first_word + thread % kWinogradRun;
  const bool writes = tile < chunk.tiles && word < chunk.v_words;
  const int64_t position = chunk.tiles * chunk.v_words;
  Global<uint32_t> out = v + (group * kAlphaH * kAlphaW * position + tile * chunk.v_words + word);
  winograd_transform_input<T>(d, [&](int, const uint32_t (&words)[kAlphaW]) {
#pragma unroll
    for (int j = 0; j < kAlphaW; ++j) {
      staged[(j * kWarpSize + lane) * kStride + warp] = words[j];
    }
    __syncthreads();  // the row is there
#pragma unroll
    for (int j = 0; j < kAlphaW; ++j) {
      const uint32_t word_of_row =
          staged[(j * kWarpSize + thread / kWinogradRun) * kStride + thread % kWinogradRun];
      if (writes) *out = word_of_row;
      out = out + position;
    }
    __syncthreads();  // the next row may overwrite it
  });
}

// y = activation(Aᵀ M A + bias). A thread takes a word of M: one tile of two channels, where these
// are last in y, or one channel of two tiles.
template <class T, int kAlphaH, int kAlphaW, bool kChannelsLast>
__global__ void __launch_bounds__(kWinogradThreads, 1)
    winograd_output(WinogradArgs<T> args, WinogradChunk chunk, Global<const uint32_t> m,
                    Global<const float> scales) {
  using Product = WinogradProduct<T>;
  constexpr int kCount = kPerWord<T>;
  const int64_t words = ceil_div<int64_t>(chunk.columns, kCount);
  const WinogradPlace place(chunk.rows, words);
  if (place.line >= chunk.rows || place.word >= words) return;
  const int64_t column = place.word * kCount;
  const int64_t matrix = chunk.rows * chunk.m_words;
  const int64_t scale_matrix = chunk.scale_rows * chunk.scale_columns;
  const int64_t first_position = place.group * (kAlphaH * kAlphaW);
  const Global<const uint32_t> from =
      m + (first_position * matrix + place.line * chunk.m_words + place.word);
  const Global<const float> scale = scales + (first_position * scale_matrix +
                                              (place.line >> chunk.row_log2) * chunk.scale_columns +
                                              (column >> chunk.column_log2));
  const int64_t group = chunk.first_group + place.group;

  const auto get = [&](int j, float (&values)[kCount][kAlphaH]) {
    Global<const uint32_t> at = from + j * matrix;
    Global<const float> scale_at = scale + j * scale_matrix;
#pragma unroll
    for (int i = 0; i < kAlphaH; ++i) {
      const uint32_t word = load_nc<uint32_t>(at, 0);
      float factor = 1.0f;
      if constexpr (kCount == 2) factor = load_nc<float>(scale_at, 0);
#pragma unroll
      for (int s = 0; s < kCount; ++s) values[s][i] = word_element<Product>(word, s) * factor;
      at = at + kAlphaW * matrix;
      scale_at = scale_at + kAlphaW * scale_matrix;
    }
  };
  const int tile_h = args.shape.tile_h, tile_w = args.shape.tile_w;
  if constexpr (kChannelsLast) {
    const WinogradTile tile(args.shape, chunk.first_tile + place.line);
    winograd_transform_output<kCount, kAlphaH, kAlphaW>(
        tile_h, tile_w, get, [&](int i, float (&y)[kCount][kMaxTile<kAlphaW>]) {
          winograd_store<T>(args, tile.n, group, column, tile.row + i, tile.column, y);
        });
  } else {
    const WinogradTile first(args.shape, chunk.first_tile + column);
    const WinogradTile last(args.shape, chunk.first_tile + column + kCount - 1);
    winograd_transform_output<kCount, kAlphaH, kAlphaW>(
        tile_h, tile_w, get, [&](int i, float (&y)[kCount][kMaxTile<kAlphaW>]) {
#pragma unroll
          for (int s = 0; s < kCount; ++s) {
            if (column + s >= chunk.tiles) break;
            const WinogradTile& tile = s == 0 ? first : last;
            float row[1][kMaxTile<kAlphaW>];
#pragma unroll
            for (int j = 0; j < kMaxTile<kAlphaW>; ++j) row[0][j] = y[s][j];
            winograd_store<T>(args, tile.n, group, place.line, tile.row + i, tile.column, row);
          }
        });
  }
}

}  // namespace compressops
