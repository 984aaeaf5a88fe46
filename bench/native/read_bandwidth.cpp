// GB/s at which memory is read that is read again and again: of a core's caches, of the last one or
// of DRAM, as its size asks. For benchmarks, which compile it with -march=native and load it with
// ctypes.

#include <algorithm>
#include <vector>

#include "peak.h"

namespace {

constexpr int kChains = 8;

}  // namespace

// Of `bytes` that `threads` threads share.
extern "C" double read_bandwidth(int threads, long bytes) {
  const long vectors = std::max(1L, bytes / threads / long(sizeof(Vector)) / kChains) * kChains;
  std::vector<Vector> memory(vectors * threads);
  return best_rate(threads, sizeof(Vector), [&](long steps) {
    const Vector* own = memory.data() + vectors * omp_get_thread_num();
    Vector sums[kChains] = {};
    for (long done = 0; done < steps;) {
      const long count = std::min(vectors, steps - done);
      for (long i = 0; i + kChains <= count; i += kChains)
#pragma GCC unroll 8
        for (int chain = 0; chain < kChains; ++chain) sums[chain] += own[i + chain];
      done += count;
    }
    float sum = 0;
    for (auto& chain : sums) sum += chain[0];
    return sum;
  });
}
