// int8_linear on Hopper's wgmma: 128 × 256 (or 128) outputs a tile, one block a multiprocessor that
// takes tile after tile. One warp fills stages by TMA, two warpgroups multiply 64 rows each.
//
// On an H200 a multiprocessor multiplies and adds 4096 int8 a clock: a step of 128 inputs of a 128
// × 256 tile takes 1024 clocks, in which (128 + 256) · 128 bytes = 48 bytes a clock come from L2,
// and each wgmma of 64 × 256 × 32 reads 10 KB of shared memory in 128 clocks, 80 of the 128 bytes a
// clock that there are. M = 4096, N = K = 8192: 1024 tiles of 132 blocks are 7.8 of 8 rounds, a
// tile's 64 steps 65,536 clocks. The epilogue, about 10 instructions an output of two warps on each
// of four schedulers, is 3000 of them, and the next tile's stages are filled meanwhile.
#pragma once

#include "int8_linear.cuh"
#include "stages.cuh"

namespace compressops {

template <int kBlockN_, int kStages_>
struct Int8WgmmaTile {
  static constexpr int kBlockM = 128, kBlockN = kBlockN_, kStepK = 128;
  static constexpr int kWarpgroups = kBlockM / 64, kWarps = 4 * kWarpgroups;  // that multiply
  static constexpr int kThreads = (kWarps + 1) * kWarpSize;
  static constexpr int kSums = kBlockN / 2;  // of a thread
  static constexpr int kStageLeft = kBlockM * kStepK, kStageRight = kBlockN * kStepK;
  static constexpr int kStageBytes = kStageLeft + kStageRight;
  using Ring = StageRing<kStages_>;
  static constexpr int kSharedBytes = kStages_ * kStageBytes + Ring::kBarrierBytes;
};

using Int8Wgmma128 = Int8WgmmaTile<128, 6>;
using Int8Wgmma256 = Int8WgmmaTile<256, 4>;

// Stores a thread's sums of 64 rows × 2 kSums columns, as wgmma_s8 has them. A lane holds two
// outputs side by side. In 16 bits it takes two more from its neighbour, so that four lanes write
// whole sectors of 32 bytes.
template <class T, int kSums>
__device__ __forceinline__ void int8_linear_store_wgmma(const Int8LinearArgs<T>& args,
                                                        const int (&sums)[kSums], int64_t first_m,
                                                        int64_t first_n) {
  constexpr int kTogether = sizeof(T) == 2 ? 2 : 1;  // blocks of 8 columns
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int j = 0; j < kSums / 4; j += kTogether) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = first_m + 8 * half + lane / 4;
      uint32_t words[2];
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        float values[kPerWord<T>];
#pragma unroll
        for (int i = 0; i < kPerWord<T>; ++i) {
          const int block = kTogether == 2 ? j + word : j, column = kTogether == 2 ? i : word;
          const int64_t n = first_n + 8 * block + 2 * (lane % 4) + column;
          const bool valid = m < args.M && n < args.N;
          values[i] = int8_linear_value(args, valid ? m : 0, valid ? n : 0,
                                        sums[4 * block + 2 * half + column]);
        }
        words[word] = pack_word<T>(values);
      }
      int64_t n = first_n + 8 * j + 2 * (lane % 4);
      if constexpr (kTogether == 2) {
        // Even lanes take the first block of columns, odd ones the second.
        const bool odd = lane % 2 != 0;
        const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? words[0] : words[1], 1);
        words[0] = odd ? other : words[0];
        words[1] = odd ? words[1] : other;
        n = first_n + 8 * (odd ? j + 1 : j) + lane % 4 / 2 * 4;
      }
      if (m < args.M && n < args.N) {
        view_as<int2>(args.y + (m * args.N + n))[0] =
            int2{static_cast<int>(words[0]), static_cast<int>(words[1])};
      }
    }
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    int8_linear_wgmma(Int8LinearArgs<T> args, const __grid_constant__ TensorMap q_map,
                      const __grid_constant__ TensorMap weight_map) {
  if constexpr (kHasWgmma) {
    using Ring = typename Tile::Ring;
    constexpr int kStages = Ring::kStages;
    COMPRESSOPS_TMA_SHARED(int8_t, shared, Tile::kSharedBytes);
    const Shared<int8_t> left = slice(shared, 0, kStages * Tile::kStageLeft);
    const Shared<int8_t> right =
        slice(shared, kStages * Tile::kStageLeft, kStages * Tile::kStageRight);
    Ring ring(view_as<uint64_t>(slice(shared, kStages * Tile::kStageBytes, Ring::kBarrierBytes)));
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarpSize, warp = thread / kWarpSize;
    if (thread == 0) ring.init(Tile::kWarps);
    __syncthreads();

    const int64_t tiles_m = ceil_div<int64_t>(args.M, Tile::kBlockM);
    const int64_t tiles_n = ceil_div<int64_t>(args.N, Tile::kBlockN);
    const int steps = static_cast<int>(ceil_div<int64_t>(args.K, Tile::kStepK));
    for (int64_t tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
      int64_t tile_m, tile_n;
      tile_of_block(tile, tiles_m, tiles_n, &tile_m, &tile_n);
      const int64_t first_m = tile_m * Tile::kBlockM, first_n = tile_n * Tile::kBlockN;
      if (warp == Tile::kWarps) {
        if (lane > 0) continue;
        for (int step = 0; step < steps; ++step, ring.next()) {
          ring.acquire(Tile::kStageBytes);
          const int64_t k = int64_t{step} * Tile::kStepK;
          const Shared<uint64_t> full = ring.full + ring.stage;
          tma_load(left + ring.stage * Tile::kStageLeft, q_map, first_m, k, full);
          tma_load(right + ring.stage * Tile::kStageRight, weight_map, first_n, k, full);
        }
        continue;
      }

      const int group_row = warp / 4 * 64;
      int sums[Tile::kSums] = {};
      for (int step = 0; step < steps; ++step, ring.next()) {
        ring.wait();
        const Shared<int8_t> rows =
            left + (ring.stage * Tile::kStageLeft + group_row * Tile::kStepK);
        const Shared<int8_t> columns = right + ring.stage * Tile::kStageRight;
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < Tile::kStepK; k += 32) {
          wgmma_s8(sums, wgmma_operand(rows, k), wgmma_operand(columns, k));
        }
        wgmma_commit();
        // The products of the step before are done, those of this one run on.
        wgmma_wait<1>();
        if (step > 0 && lane == 0) ring.release((ring.stage + kStages - 1) % kStages);
      }
      wgmma_wait<0>();
      if (lane == 0) ring.release((ring.stage + kStages - 1) % kStages);
      int8_linear_store_wgmma(args, sums, first_m + group_row + warp % 4 * 16, first_n);
    }
  }
}

// Whether TMA can read the operands, and y be written 8 bytes at a time.
template <class T>
bool int8_linear_fits_wgmma(const Int8LinearArgs<T>& args) {
  constexpr int64_t kMost = 0x7fffffff - 256;  // coordinates are 32 bits wide
  return args.K > 0 && args.K % 16 == 0 && args.N % 8 == 0 && args.M <= kMost && args.N <= kMost &&
         misalignment(args.weight, 16) == 0 && misalignment(args.q, 16) == 0 &&
         misalignment(args.y, 8) == 0;
}

template <class Tile, class T>
cudaError_t launch_int8_linear_wgmma(const Int8LinearArgs<T>& args, int64_t multiprocessors,
                                     cudaStream_t stream) {
  if (!int8_linear_fits_wgmma(args)) return cudaErrorInvalidValue;
  TensorMap q_map, weight_map;
  cudaError_t error = make_tensor_map<int8_t>(args.q, args.M, args.K, padded_to_16(args.K),
                                              Tile::kBlockM, Tile::kStepK, true, &q_map);
  if (error != cudaSuccess) return error;
  error = make_tensor_map<int8_t>(args.weight, args.N, args.K, args.K, Tile::kBlockN, Tile::kStepK,
                                  true, &weight_map);
  if (error != cudaSuccess) return error;
  const int64_t tiles =
      ceil_div<int64_t>(args.M, Tile::kBlockM) * ceil_div<int64_t>(args.N, Tile::kBlockN);
  const int64_t blocks = tiles < multiprocessors ? tiles : multiprocessors;
  return launch(int8_linear_wgmma<T, Tile>, dim3(static_cast<unsigned>(blocks)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, args, q_map, weight_map);
}

}  // namespace compressops
