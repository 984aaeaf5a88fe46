// bsr_linear_grad_values: of grad[M, N].T @ x[M, K] the stored blocks alone.
//
// A block of threads computes kTile × kTile entries of one stored block. Its four warps take
// different rows, 16 at a time, each with stages of its own in shared memory, so that none waits
// for another before their sums are added up. A step of 16 rows brings 2 · 16 · kTile elements for
// 16 · kTile² multiply-adds: 16 a byte in 16 bits with tiles of 64, 4 with tiles of 16. Blocks of a
// row read the same columns of grad, which L2 holds.
#pragma once

#include "bsr_operands.cuh"
#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

template <class T>
struct BsrGradValuesArgs {
  int64_t M, N, K;
  Global<const T> grad, x;          // [M, N], [M, K], rows on 16 bytes
  int64_t grad_stride, x_stride;    // elements from row to row
  int64_t grad_columns, x_columns;  // whole pieces that can be read of a row
  int64_t nnz, r, c;
  int64_t rows;               // of blocks
  Global<const int> crow;     // [rows + 1]
  Global<const int> columns;  // [nnz]
  Global<float> result;       // [nnz, r, c]
};

constexpr int kBsrGradWarps = 4, kBsrGradRows = 16;

template <class T, int kTile_>
struct BsrGradTile {
  static constexpr int kTile = kTile_, kStages = 4;
  static constexpr int kPieces = kTile * static_cast<int>(sizeof(T)) / 16;  // of a row
  static constexpr int kSide = kBsrGradRows * kPieces;                      // of a stage
  static constexpr int kWarp = kStages * 2 * kSide;
  static constexpr int kTiles = kTile / 16;
  static constexpr int kSums = kTile * kTile / kWarpSize;
  static constexpr int kSharedBytes = kBsrGradWarps * kWarp * 16;
  static_assert((kBsrGradWarps - 1) * kSums * kWarpSize * 4 <= kSharedBytes);
};

// Adds 16 rows of grad.T @ x to sums [i][j][e]: of output 16 i + 8 (e / 2 % 2) + lane / 4 and input
// 16 j + 8 (e / 4) + 2 (lane % 4) + e % 2.
template <class T, class Tile>
__device__ __forceinline__ void add_rows(float (&sums)[Tile::kTiles][Tile::kTiles][8],
                                         Shared<int4> grad, Shared<int4> x, int lane) {
  constexpr int kPieces = Tile::kPieces;
  if constexpr (sizeof(T) == 2) {
    uint32_t left[Tile::kTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kTiles; ++i) {
      // Matrices: outputs 0-7 and 8-15 of rows 0-7, then of rows 8-15.
      ldmatrix_x4_trans(left[i],
                        grad + bsr_place<kPieces>(lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
    }
#pragma unroll
    for (int j = 0; j < Tile::kTiles; ++j) {
      // Matrices: both halves of the rows of inputs 0-7, then of 8-15.
      uint32_t right[4];
      ldmatrix_x4_trans(right, x + bsr_place<kPieces>(lane % 16, 2 * j + lane / 16));
#pragma unroll
      for (int i = 0; i < Tile::kTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float part[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) part[e] = sums[i][j][4 * half + e];
          mma_m16n8k16<T>(part, left[i], {right[2 * half], right[2 * half + 1]});
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][4 * half + e] = part[e];
        }
      }
    }
  } else {
    const auto element = [&](Shared<int4> side, int row, int column) {
      return view_as<float>(side)[4 * bsr_place<kPieces>(row, column / 4) + column % 4];
    };
    for (int row = 0; row < kBsrGradRows; ++row) {
      float left[2 * Tile::kTiles];
#pragma unroll
      for (int i = 0; i < 2 * Tile::kTiles; ++i) left[i] = element(grad, row, 8 * i + lane / 4);
#pragma unroll
      for (int j = 0; j < 2 * Tile::kTiles; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const float right = element(x, row, 8 * j + 2 * (lane % 4) + odd);
#pragma unroll
          for (int i = 0; i < 2 * Tile::kTiles; ++i) {
            sums[i / 2][j / 2][j % 2 * 4 + i % 2 * 2 + odd] += left[i] * right;
          }
        }
      }
    }
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(kBsrGradWarps* kWarpSize)
    bsr_grad_values(BsrGradValuesArgs<T> args) {
  constexpr int kPieces = Tile::kPieces, kPiece = 16 / static_cast<int>(sizeof(T));
  constexpr int kTile = Tile::kTile, kStages = Tile::kStages, kSide = Tile::kSide;
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, Tile::kSharedBytes);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const Shared<int4> mine = slice(shared, warp * Tile::kWarp, Tile::kWarp);

  const int64_t tiles_c = args.c / kTile, tiles = args.r / kTile * tiles_c;
  const int64_t block = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  // The row of blocks: rows that end at this block or before.
  int64_t low = 0, high = args.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load_nc<int>(args.crow, middle + 1) <= block)
      low = middle + 1;
    else
      high = middle;
  }
  const int64_t out = tile / tiles_c * kTile, in = tile % tiles_c * kTile;  // within the block
  const int64_t first_n = low * args.r + out;
  const int64_t first_k = int64_t{load_nc<int>(args.columns, block)} * args.c + in;

  const auto copy = [&](Shared<int4> to, Global<const T> from, int64_t stride, int64_t columns,
                        int64_t first_row, int64_t first_column) {
#pragma unroll
    for (int i = 0; i < ceil_div(kSide, kWarpSize); ++i) {
      const int index = i * kWarpSize + lane, row = index / kPieces, piece = index % kPieces;
      const int64_t m = first_row + row, column = first_column + piece * kPiece;
      // Indices that are none must not lead out of the arrays.
      const bool valid = m < args.M && column >= 0 && column < columns;
      cp_async_16(to + bsr_place<kPieces>(row, piece),
                  view_as<const int4>(from + (valid ? m * stride + column : 0)), valid);
    }
  };
  static_assert(kSide % kWarpSize == 0);
  const int64_t steps = ceil_div<int64_t>(args.M, kBsrGradRows * kBsrGradWarps);
  const auto load_step = [&](int64_t step) {
    const int64_t m = (step * kBsrGradWarps + warp) * kBsrGradRows;
    const int stage = static_cast<int>(step % kStages) * 2 * kSide;
    copy(slice(mine, stage, kSide), args.grad, args.grad_stride, args.grad_columns, m, first_n);
    copy(slice(mine, stage + kSide, kSide), args.x, args.x_stride, args.x_columns, m, first_k);
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load_step(step);
    cp_async_commit();  // also when empty: the waits below count groups
  }
  float sums[Tile::kTiles][Tile::kTiles][8] = {};
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // the warp's copies of this step are there, and the stage before is free
    if (step + kStages - 1 < steps) load_step(step + kStages - 1);
    cp_async_commit();
    const int stage = static_cast<int>(step % kStages) * 2 * kSide;
    add_rows<T, Tile>(sums, slice(mine, stage, kSide), slice(mine, stage + kSide, kSide), lane);
  }
  cp_async_wait<0>();

  // The first warp adds the others' sums, in their order.
  const Shared<float> others = view_as<float>(shared);
  __syncthreads();  // the stages are free
#pragma unroll
  for (int e = 0; e < Tile::kSums; ++e) {
    if (warp > 0) {
      others[((warp - 1) * Tile::kSums + e) * kWarpSize + lane] =
          sums[e / 8 / Tile::kTiles][e / 8 % Tile::kTiles][e % 8];
    }
  }
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int e = 0; e < Tile::kSums; ++e) {
    const int i = e / 8 / Tile::kTiles, j = e / 8 % Tile::kTiles;
    float sum = sums[i][j][e % 8];
#pragma unroll
    for (int other = 0; other < kBsrGradWarps - 1; ++other) {
      sum += others[(other * Tile::kSums + e) * kWarpSize + lane];
    }
    const int row = 16 * i + 8 * (e / 2 % 2) + lane / 4;
    const int column = 16 * j + 8 * (e / 4 % 2) + 2 * (lane % 4) + e % 2;
    const bool inside = first_n + row < args.N && first_k + column < args.K;
    args.result[(block * args.r + out + row) * args.c + in + column] = inside ? sum : 0.0f;
  }
}

template <class T, int kTile>
cudaError_t launch_bsr_grad_tile(const BsrGradValuesArgs<T>& args, cudaStream_t stream) {
  using Tile = BsrGradTile<T, kTile>;
  const int64_t blocks = args.nnz * (args.r / kTile) * (args.c / kTile);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(bsr_grad_values<T, Tile>, dim3(static_cast<unsigned>(blocks)),
                dim3(kBsrGradWarps * kWarpSize), Tile::kSharedBytes, stream, args);
}

// With the largest tiles that fill the blocks; r and c are multiples of 16.
template <class T>
cudaError_t launch_bsr_grad_values(const BsrGradValuesArgs<T>& args, cudaStream_t stream) {
  if (args.nnz == 0) return cudaSuccess;
  if (args.r % 64 == 0 && args.c % 64 == 0) return launch_bsr_grad_tile<T, 64>(args, stream);
  if (args.r % 32 == 0 && args.c % 32 == 0) return launch_bsr_grad_tile<T, 32>(args, stream);
  return launch_bsr_grad_tile<T, 16>(args, stream);
}

}  // namespace compressops
