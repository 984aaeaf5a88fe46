// What the tiled matrix products of int8 share: where things lie in shared memory, which block
// takes which tile.
#pragma once

#include "device.cuh"

namespace compressops {

// Where chunk `chunk` of row `row` lies in a stage. Two rows share a 128-byte line of shared
// memory; the XOR makes the eight rows that one ldmatrix matrix reads fall in eight different bank
// groups.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * 4 + (chunk ^ (row / 2 % 4));
}

// Blocks that run at the same time should share rows of q and of the weight in L2: they take the
// tiles in groups of 8 tile rows, down each column of a group first.
__device__ __forceinline__ void tile_of_block(int64_t block_index, int64_t tiles_m, int64_t tiles_n,
                                              int64_t* tile_m, int64_t* tile_n) {
  constexpr int64_t kGroup = 8;
  const int64_t group = block_index / (kGroup * tiles_n);
  const int64_t rows = min(kGroup, tiles_m - group * kGroup);
  const int64_t in_group = block_index - group * kGroup * tiles_n;
  *tile_m = group * kGroup + in_group % rows;
  *tile_n = in_group / rows;
}

}  // namespace compressops
