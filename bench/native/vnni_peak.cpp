// The int8 rate of this machine: independent chains of vpdpbusd in registers, no memory. For
// benchmarks, which compile it with -march=native and load it with ctypes.

#include <immintrin.h>
#include <omp.h>

#include <chrono>

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

// GOP/s of `threads` threads, two operations a product, the best of some tries.
extern "C" double vnni_peak(int threads) {
  constexpr long kSteps = 4'000'000;
  double best = 0;
  volatile int sink = 0;
  for (int round = 0; round < 7; ++round) {
    auto began = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
    sink = work(kSteps);
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    double rate = 2.0 * 64 * kChains * kSteps * threads / seconds.count() / 1e9;
    if (rate > best) best = rate;
  }
  return best;
}
