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

#include "bsr_linear.h"

namespace compressops::cpu {
namespace {

// 24 sums, a vector of weights; the rows of x are operands in memory.
constexpr int kMostRows = 24;
constexpr int kNarrowRows = 16;
constexpr bool kIntegers = false;

#include "simd_avx512.h"

inline Vec add_products(Vec sums, Vec x, Vec weights) { return sums + x * weights; }
inline Vec add_sums(Vec a, Vec b) { return a + b; }

#include "bsr_linear_simd.h"

}  // namespace

const BsrLinearKernels& bsr_linear_avx512() {
  static constexpr BsrLinearKernels instance = kernels("avx512", nullptr);
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
