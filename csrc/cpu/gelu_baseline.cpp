#include "gelu.h"

namespace compressops::cpu {
namespace {

constexpr int kLanes = 4;

#include "gelu_simd.h"

}  // namespace

void gelu_baseline(float* values, int64_t count) { gelu_in_place(values, count); }

}  // namespace compressops::cpu
