// Blocks that share a tile of results, each with the products of some inputs: how their sums come
// together without a second launch.
#pragma once

#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

// Whether this block comes last of the `splits` of its tile, when all of it has written what the
// last one reads. tickets: a zero for each tile, and zeros again when all have come.
__device__ __forceinline__ bool comes_last(Global<unsigned> tickets, int64_t tile, int64_t splits) {
  COMPRESSOPS_SHARED_ARRAY(int, is_last, 1);
  __threadfence();
  __syncthreads();  // all sums of the block are there before it takes its ticket
  if (threadIdx.x == 0) {
    is_last[0] = atomicAdd(tickets + tile, 1u) + 1 == splits;
    if (is_last[0]) tickets[tile] = 0;  // for the next launch
  }
  __syncthreads();
  if (!is_last[0]) return false;
  __threadfence();
  return true;
}

// Adds the sums of the `splits` blocks of a tile, in their order, whichever comes last: to it alone
// this returns true, and the sums are the whole ones. `columns` threads hold sums, of which this is
// number `column`, or holds none and says -1. partials: splits · kSums · columns for each tile;
// tickets: a zero for each.
template <int kSums, class Sum>
__device__ __forceinline__ bool add_splits(Sum (&sums)[kSums], Global<Sum> partials,
                                           Global<unsigned> tickets, int64_t tile, int64_t split,
                                           int64_t splits, int column, int columns) {
  const auto place = [&](int64_t of_split, int e) {
    return ((tile * splits + of_split) * kSums + e) * columns + column;
  };
#pragma unroll
  for (int e = 0; e < kSums; ++e) {
    if (column >= 0) partials[place(split, e)] = sums[e];
  }
  if (!comes_last(tickets, tile, splits)) return false;
  if (column < 0) return true;
#pragma unroll
  for (int e = 0; e < kSums; ++e) sums[e] = 0;
#pragma unroll 1
  for (int64_t i = 0; i < splits; ++i) {
#pragma unroll
    for (int e = 0; e < kSums; ++e) sums[e] += load_cg<Sum>(partials, place(i, e));
  }
  return true;
}

}  // namespace compressops
