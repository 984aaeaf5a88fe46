// Results whose type is known when a kernel runs, not when it is compiled.
#pragma once

#include "device.cuh"

namespace compressops {

enum class FloatType : int { kFloat, kHalf, kBfloat16 };

__device__ __forceinline__ void store_float(const Global<uint8_t>& y, FloatType type, int64_t index,
                                            float value) {
  if (type == FloatType::kFloat) {
    view_as<float>(y)[index] = value;
  } else if (type == FloatType::kHalf) {
    view_as<__half>(y)[index] = from_float<__half>(value);
  } else {
    view_as<__nv_bfloat16>(y)[index] = from_float<__nv_bfloat16>(value);
  }
}

}  // namespace compressops
