// The timing of the peaks: `work(steps)` on every thread at once. And the widest vector of floats.
#pragma once

#include <omp.h>

#include <chrono>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

// Billions of operations a second of `threads` threads, the best of some tries.
template <typename Work>
double best_rate(int threads, double operations_a_step, Work work) {
  constexpr long kSteps = 4'000'000;
  double best = 0;
  volatile auto sink = work(1);
  for (int round = 0; round < 7; ++round) {
    auto began = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
    sink = work(kSteps);
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    double rate = operations_a_step * kSteps * threads / seconds.count() / 1e9;
    if (rate > best) best = rate;
  }
  return best;
}
