// The activations that ops fuse into their epilogues.
#pragma once

#include "device.cuh"

namespace compressops {

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2 };

__device__ __forceinline__ float activate(float value, Activation activation) {
  if (activation == Activation::kRelu) {
    return value < 0.0f ? 0.0f : value;  // keeps NaN, as fmaxf would not
  }
  if (activation == Activation::kGelu) {
    return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
  }
  return value;
}

}  // namespace compressops
