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

#include "bsr_linear.h"

namespace compressops::cpu {
namespace {

// 6 × 2 sums, 2 vectors of weights and a broadcast item fill the 16 registers.
constexpr int kMostRows = 6;
constexpr int kNarrowRows = 4;
constexpr bool kIntegers = false;

#include "simd_avx2.h"

inline Vec add_products(Vec sums, Vec x, Vec weights) { return sums + x * weights; }
inline Vec add_sums(Vec a, Vec b) { return a + b; }

#include "bsr_linear_simd.h"

}  // namespace

const BsrLinearKernels& bsr_linear_avx2() {
  static constexpr BsrLinearKernels instance = kernels("avx2", nullptr);
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
