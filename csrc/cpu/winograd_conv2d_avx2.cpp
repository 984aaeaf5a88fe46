#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>
#include <string.h>

#include "winograd_conv2d.h"

namespace compressops::cpu {
namespace {

// 6 × 2 sums, 2 vectors of weights and a broadcast value fill the 16 registers.
constexpr int kRegisterRows = 6;

#include "simd_avx2.h"
#include "winograd_conv2d_simd.h"

}  // namespace

const WinogradConv2dKernels& winograd_conv2d_avx2() {
  static constexpr WinogradConv2dKernels instance = kernels("avx2");
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
