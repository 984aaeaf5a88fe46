#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <string.h>

#include "winograd_conv2d.h"

namespace compressops::cpu {
namespace {

// 12 × 2 sums, 2 vectors of weights and a broadcast value fill the 32 registers.
constexpr int kRegisterRows = 12;

#include "simd_avx512.h"
#include "winograd_conv2d_simd.h"

}  // namespace

const WinogradConv2dKernels& winograd_conv2d_avx512() {
  static constexpr WinogradConv2dKernels instance = kernels("avx512");
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
