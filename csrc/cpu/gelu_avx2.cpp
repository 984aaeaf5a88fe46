#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "gelu.h"

namespace compressops::cpu {
namespace {

constexpr int kLanes = 8;

#include "gelu_simd.h"

}  // namespace

void gelu_avx2(float* values, int64_t count) { gelu_in_place(values, count); }

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
