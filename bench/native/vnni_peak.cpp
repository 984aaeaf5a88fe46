// The int8 rate of this machine: independent chains of vpdpbusd in registers, no memory. For
// benchmarks, which compile it with -march=native and load it with ctypes.

#include <immintrin.h>

#include "peak.h"

#if !defined(__AVX512VNNI__)
#error "this processor has no AVX-512 VNNI"
#endif

namespace {

// Latency times throughput of the units is below 12 on every x86 so far.
constexpr int kChains = 12;

int work(long steps) {
  __m512i chains[kChains];
  const __m512i codes = _mm512_set1_epi8(3), weights = _mm512_set1_epi8(-2);
  for (auto& chain : chains) chain = codes;
  for (long step = 0; step < steps; ++step) {
    // Unrolled, so that every chain is a register.
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      __m512i chain = _mm512_dpbusd_epi32(chains[i], codes, weights);
      // Keeps the compiler from merging chains, which all hold the same numbers.
      asm volatile("" : "+v"(chain));
      chains[i] = chain;
    }
  }
  int sum = 0;
  for (auto& chain : chains) sum += _mm512_reduce_add_epi32(chain);
  return sum;
}

}  // namespace

// GOP/s, two operations a product, of `threads` threads.
extern "C" double vnni_peak(int threads) { return best_rate(threads, 2.0 * 64 * kChains, work); }
