#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

// GCC 12 warns of its own _mm512_undefined_* (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <string.h>

#include "bsr_linear.h"

namespace compressops::cpu {
namespace {

// 12 sums hide the latency, and spare registers for the broadcast items, which vpdpbusd takes as
// its first operand, not from memory.
constexpr int kMostRows = 12;
constexpr int kNarrowRows = 8;
constexpr bool kIntegers = true;

#include "simd_avx512.h"

inline Vec add_products(Vec sums, Vec x, Vec weights) {
  return (Vec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
}
inline Vec add_sums(Vec a, Vec b) { return (Vec)((Bits)a + (Bits)b); }

#include "bsr_int8_linear_simd.h"
#include "bsr_linear_simd.h"

}  // namespace

const BsrLinearKernels& bsr_int8_linear_avx512() {
  static constexpr BsrLinearKernels instance = kernels("avx512_vnni", scale);
  return instance;
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
