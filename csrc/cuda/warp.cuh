// Reductions over the lanes of a warp.
#pragma once

#include "device.cuh"

namespace compressops {

// Of each kLanes lanes side by side, for all of them.
template <int kLanes>
__device__ __forceinline__ unsigned lanes_max(unsigned value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, lanes));
  }
  return value;
}

__device__ __forceinline__ unsigned warp_max(unsigned value) { return lanes_max<kWarpSize>(value); }

}  // namespace compressops
