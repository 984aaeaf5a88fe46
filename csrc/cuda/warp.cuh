// Reductions over the lanes of a warp.
#pragma once

#include "device.cuh"

namespace compressops {

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, lanes));
  }
  return value;
}

}  // namespace compressops
