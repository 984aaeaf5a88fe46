// The float32 FMA rate of this machine: independent chains in registers, no memory. For benchmarks,
// which compile it with -march=native and load it with ctypes.

#include "peak.h"

namespace {

// Latency times throughput of FMA units is below 12 on every x86 so far.
constexpr int kChains = 12;

float work(long steps) {
  Vector chains[kChains], factor, term;
  for (int lane = 0; lane < kLanes; ++lane) factor[lane] = 0.999f, term[lane] = 0.001f;
  for (auto& chain : chains) chain = term;
  for (long step = 0; step < steps; ++step) {
    // Unrolled, so that every chain is a register.
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      Vector chain = chains[i] * factor + term;
      // Keeps the compiler from merging chains, which all hold the same numbers.
      asm volatile("" : "+v"(chain));
      chains[i] = chain;
    }
  }
  float sum = 0;
  for (auto& chain : chains) sum += chain[0];
  return sum;
}

}  // namespace

// GFLOP/s of `threads` threads.
extern "C" double fma_peak(int threads) { return best_rate(threads, 2.0 * kLanes * kChains, work); }
