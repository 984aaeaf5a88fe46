// Int8 matrix products on the tensor cores (mma.sync m16n8k32, sm_80 and newer): what int8_linear
// and int8_conv2d share. Per block and step of 64 along K, (kBlockM + kBlockN) · 64 bytes come in
// and 2 · kBlockM · kBlockN · 64 operations are done on them, 128 a byte for 128 × 128 tiles.
#pragma once

#include "device.cuh"
#include "ptx.cuh"
#include "tiles.cuh"

namespace compressops {

// A block computes a kBlockM × kBlockN tile, a warp kWarpM × 32 of it. K goes by in steps of
// 64 bytes, kStages of them in shared memory, the copies of the later ones under way.
template <int kBlockM_, int kBlockN_, int kWarpM_, int kStages_>
struct Int8Tile {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr int kWarpM = kWarpM_, kWarpN = 32;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = kBlockM / kWarpM * kWarpsN * kWarpSize;
  static constexpr int kChunks = 4;  // 16-byte chunks in a row of a stage
  static constexpr int kStepK = 16 * kChunks;
  static constexpr int kStageLeft = kBlockM * kChunks, kStageRight = kBlockN * kChunks;
  static constexpr int kSharedBytes = kStages * (kStageLeft + kStageRight) * 16;
  // Rows of either operand whose chunk thread % kChunks a thread copies: its first is thread /
  // kChunks, the others follow kCopyRows apart.
  static constexpr int kCopyRows = kThreads / kChunks;
  static constexpr int kCopiesLeft = kBlockM / kCopyRows, kCopiesRight = kBlockN / kCopyRows;
  static_assert(kBlockM % kCopyRows == 0 && kBlockN % kCopyRows == 0);

  int sums[kTilesM][kTilesN][4] = {};
};

using Int8Tile64 = Int8Tile<64, 64, 32, 4>;
using Int8Tile128 = Int8Tile<128, 128, 64, 4>;

// Where the warp's part of the block's tile begins.
template <class Tile>
__device__ __forceinline__ void warp_of_tile(int* row, int* column) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  *row = warp / Tile::kWarpsN * Tile::kWarpM;
  *column = warp % Tile::kWarpsN * Tile::kWarpN;
}

// Adds the products of all steps to the sums. load_step(step, left, right) starts the copies of a
// step's rows, chunk c of row r to swizzled(r, c); it is called for one step after the other.
// `shared`: kSharedBytes.
template <class Tile, class LoadStep>
__device__ __forceinline__ void multiply_tile(Tile& tile, Shared<int4> shared, int steps,
                                              LoadStep&& load_step) {
  const Shared<int4> shared_left = slice(shared, 0, Tile::kStages * Tile::kStageLeft);
  const Shared<int4> shared_right =
      slice(shared, Tile::kStages * Tile::kStageLeft, Tile::kStages * Tile::kStageRight);
  const auto left_of = [&](int step) {
    return slice(shared_left, step % Tile::kStages * Tile::kStageLeft, Tile::kStageLeft);
  };
  const auto right_of = [&](int step) {
    return slice(shared_right, step % Tile::kStages * Tile::kStageRight, Tile::kStageRight);
  };
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int warp_m, warp_n;
  warp_of_tile<Tile>(&warp_m, &warp_n);

#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load_step(step, left_of(step), right_of(step));
    cp_async_commit();  // also when empty: the waits below count groups
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // everyone's copies of this step are there, and the stage before is free
    const int later = step + Tile::kStages - 1;
    if (later < steps) load_step(later, left_of(later), right_of(later));
    cp_async_commit();

    const Shared<int4> stage_left = left_of(step), stage_right = right_of(step);
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      uint32_t left[Tile::kTilesM][4];
      uint32_t right[Tile::kTilesN][2];
#pragma unroll
      for (int i = 0; i < Tile::kTilesM; ++i) {
        // Matrices: rows 0-7 and 8-15 of the first chunk, then of the second.
        ldmatrix_x4(left[i], stage_left + swizzled(warp_m + 16 * i + lane % 16, chunk + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < Tile::kTilesN; j += 2) {
        // Matrices: both chunks of rows 0-7, then of rows 8-15.
        uint32_t loaded[4];
        ldmatrix_x4(loaded, stage_right + swizzled(warp_n + 8 * j + lane / 16 * 8 + lane % 8,
                                                   chunk + lane / 8 % 2));
        right[j][0] = loaded[0];
        right[j][1] = loaded[1];
        right[j + 1][0] = loaded[2];
        right[j + 1][1] = loaded[3];
      }
#pragma unroll
      for (int i = 0; i < Tile::kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kTilesN; ++j) mma_m16n8k32_s8(tile.sums[i][j], left[i], right[j]);
      }
    }
  }
}

// Calls store(row, column, sum) for the thread's sums: column counts from the tile's first, row is
// what row_of makes of the row's number, and `row.valid` says whether the row is there at all.
template <class Tile, class RowOf, class Store>
__device__ __forceinline__ void store_tile(const Tile& tile, RowOf&& row_of, Store&& store) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int warp_m, warp_n;
  warp_of_tile<Tile>(&warp_m, &warp_n);
#pragma unroll
  for (int i = 0; i < Tile::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto row = row_of(warp_m + 16 * i + 8 * half + lane / 4);
      if (!row.valid) continue;
#pragma unroll
      for (int j = 0; j < Tile::kTilesN; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          store(row, warp_n + 8 * j + 2 * (lane % 4) + odd, tile.sums[i][j][2 * half + odd]);
        }
      }
    }
  }
}

}  // namespace compressops
