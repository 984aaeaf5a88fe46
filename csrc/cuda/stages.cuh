// A ring of stages in shared memory between a warp that fills them by TMA and warps that read them.
#pragma once

#include "ptx_sm90.cuh"

namespace compressops {

// Each side has a ring of its own, which says at which stage it is. Both go round in the same
// order.
template <int kStages_>
struct StageRing {
  static constexpr int kStages = kStages_;
  static constexpr int kBarrierBytes = 2 * kStages * 8;

  // `barriers`: [2 kStages].
  explicit __device__ StageRing(Shared<uint64_t> barriers)
      : full(slice(barriers, 0, kStages)), empty(slice(barriers, kStages, kStages)) {}

  // By one thread; a __syncthreads follows. `readers`: how many release a stage.
  __device__ __forceinline__ void init(int readers) const {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, readers);
    }
    mbarrier_fence_init();
  }

  // The filling side: waits until all readers have released the stage, and announces its bytes.
  __device__ __forceinline__ void acquire(int bytes) const {
    mbarrier_wait(empty + stage, phase ^ 1);
    mbarrier_arrive_expect(full + stage, bytes);
  }
  // The reading side.
  __device__ __forceinline__ void wait() const { mbarrier_wait(full + stage, phase); }
  __device__ __forceinline__ void release(int read_stage) const {
    mbarrier_arrive(empty + read_stage);
  }
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }

  Shared<uint64_t> full, empty;
  int stage = 0;
  unsigned phase = 0;
};

}  // namespace compressops
