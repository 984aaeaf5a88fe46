// int4_linear with activations as they are (W4A16) on Hopper's wgmma: y.T = weight @ x.T, so that
// the weight is the operand that comes from registers, where it is unpacked. A block takes one tile
// of 128 outputs × 128 rows after the other. One warp fills stages by TMA, two warpgroups multiply.
//
// A step of 64 inputs takes 512 clocks on an H200 (2048 multiply-adds a clock), in which 16 KB of x
// and 4 KB of codes come from L2, 40 bytes a clock; a wgmma reads 4 KB of shared memory in 64
// clocks. Each of two warps on each of four schedulers needs some 150 instructions a step, and 64
// more to scale a group's sums, for which it waits for its own products: the other warpgroup's run
// meanwhile.
#pragma once

#include "packed_linear_args.cuh"
#include "packed_linear_operands.cuh"
#include "stages.cuh"
#include "tiles.cuh"

namespace compressops {

struct PackedLinearWgmma {
  static constexpr int kBlockM = 128, kBlockN = 128, kStages = 8;
  static constexpr int kWarps = kBlockN / 16;  // that multiply
  // A warpgroup more, for one thread that fills: registers are moved between whole warpgroups.
  static constexpr int kThreads = (kWarps + 4) * kWarpSize;
  static constexpr int kStageX = kBlockM * 2 * kStepK, kStageCodes = kWarps * 16 * kWarpSize;
  static constexpr int kStageBytes = kStageX + kStageCodes;
  using Ring = StageRing<kStages>;
  static constexpr int kSharedBytes = kStages * kStageBytes + Ring::kBarrierBytes;
};

// The codes of a lane's two outputs in a step, moved between the four lanes that share the outputs:
// from the inputs 4 (lane % 4) … + 3 of each 16 to 2 (lane % 4) and the next, as bytes 0 and 2, and
// those + 8, as bytes 1 and 3.
__device__ __forceinline__ void move_codes(const int4& codes, int lane, uint32_t (&words)[4]) {
  const int words_in[4] = {codes.x, codes.y, codes.z, codes.w};
  const int low_lane = lane / 4 * 4 + lane % 4 / 2;
  const unsigned bytes = lane % 2 == 0 ? 0x5140 : 0x7362;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int low = __shfl_sync(kFullWarp, words_in[i], low_lane);
    const int high = __shfl_sync(kFullWarp, words_in[i], low_lane + 2);
    words[i] = __byte_perm(static_cast<uint32_t>(low), static_cast<uint32_t>(high), bytes);
  }
}

// Of a group and a lane's two outputs.
struct PackedLinearGroup {
  float scales[2];
  uint32_t zeros[2];
};

// The group, for the outputs n and n + 8.
template <class Input>
__device__ __forceinline__ PackedLinearGroup
packed_linear_group(const PackedLinearArgs<Input>& args, int n, int index) {
  PackedLinearGroup group;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = n + 8 * half;
    const int64_t at = index * args.N + column;
    const bool given = args.zeros != nullptr && column < args.N;
    group.scales[half] = column < args.N ? load_nc<float>(args.scales, at) : 0.0f;
    group.zeros[half] = PackedLinearOperands<Input>::zero_word(
        given ? load_nc<uint8_t>(args.zeros, at) : kMiddleCode<4>, 0);
  }
  return group;
}

template <class Input>
__global__ void __launch_bounds__(PackedLinearWgmma::kThreads, 1)
    packed_linear_wgmma(PackedLinearArgs<Input> args, const __grid_constant__ TensorMap x_map,
                        const __grid_constant__ TensorMap codes_map) {
  if constexpr (kHasWgmma) {
    using Tile = PackedLinearWgmma;
    constexpr int kStages = Tile::kStages, kSums = Tile::kBlockM / 2;
    COMPRESSOPS_TMA_SHARED(uint8_t, shared, Tile::kSharedBytes);
    const Shared<uint8_t> stages_x = slice(shared, 0, kStages * Tile::kStageX);
    const Shared<uint8_t> stages_codes =
        slice(shared, kStages * Tile::kStageX, kStages * Tile::kStageCodes);
    Tile::Ring ring(
        view_as<uint64_t>(slice(shared, kStages * Tile::kStageBytes, Tile::Ring::kBarrierBytes)));
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarpSize, warp = thread / kWarpSize;
    if (thread == 0) ring.init(Tile::kWarps);
    __syncthreads();

    const int64_t tiles_m = ceil_div<int64_t>(args.M, Tile::kBlockM);
    const int64_t tiles_n = ceil_div<int64_t>(args.N, Tile::kBlockN);
    const int steps_k = static_cast<int>(ceil_div<int64_t>(args.K, kStepK));
    const int steps = steps_k * static_cast<int>(args.parts);
    if (warp >= Tile::kWarps) {
      lower_registers<24>();
      if (thread != Tile::kWarps * kWarpSize) return;
      for (int64_t tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
        int64_t tile_m, tile_n;
        tile_of_block(tile, tiles_m, tiles_n, &tile_m, &tile_n);
        for (int step = 0; step < steps; ++step, ring.next()) {
          ring.acquire(Tile::kStageBytes);
          const int64_t k = step % steps_k, part = step / steps_k;
          const Shared<uint64_t> full = ring.full + ring.stage;
          // Rows past M are another part's, or zeros; what comes of them is not stored.
          tma_load(view_as<Input>(stages_x + ring.stage * Tile::kStageX), x_map,
                   part * args.M + tile_m * Tile::kBlockM, k * kStepK, full);
          tma_load(view_as<uint32_t>(stages_codes + ring.stage * Tile::kStageCodes), codes_map,
                   tile_n * Tile::kWarps, k * 4 * kWarpSize, full);
        }
      }
      return;
    }

    raise_registers<240>();
    const int groups = static_cast<int>(ceil_div(args.K, args.group_size));
    const int group_steps = groups == 1 ? steps_k : static_cast<int>(args.group_size) / kStepK;
    for (int64_t tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
      int64_t tile_m, tile_n;
      tile_of_block(tile, tiles_m, tiles_n, &tile_m, &tile_n);
      const int first_m = static_cast<int>(tile_m) * Tile::kBlockM;
      const int first_n = static_cast<int>(tile_n) * Tile::kBlockN + warp * 16 + lane / 4;
      // Of the sums so far, and of the next step.
      PackedLinearGroup current, ahead = packed_linear_group(args, first_n, 0);
      current = ahead;
      int index = 0, left_in_group = 0;
      float sums[kSums] = {}, totals[kSums] = {};
      const auto fold = [&] {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          totals[i] += current.scales[i / 2 % 2] * sums[i];
        }
      };
      const auto release = [&](int steps_ago) {
        if (lane == 0) ring.release((ring.stage + kStages - steps_ago) % kStages);
      };
      // `left` is what the step before the last was unpacked into.
      const auto multiply_step = [&](int step, uint32_t (&left)[4][4]) {
        ring.wait();
        const Shared<uint8_t> codes = stages_codes + ring.stage * Tile::kStageCodes;
        uint32_t words[4];
        move_codes(view_as<int4>(codes)[warp * kWarpSize + lane], lane, words);
        if (step > 1) {
          wgmma_wait<1>();
          release(2);
        }
#pragma unroll
        for (int block = 0; block < 4; ++block) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            PackedLinearOperands<Input>::template unpack<4, true>(
                words[2 * half + block / 2], 4 * (block % 2), ahead.zeros[half], &left[block][half],
                &left[block][2 + half]);
          }
        }
        const bool begins = left_in_group == 0;
        if (begins) {
          left_in_group = min(group_steps, steps_k - index * group_steps);
          if (step > 0) {
            wgmma_wait<0>();
            fold();
            current = ahead;
          }
        }
        const Shared<uint8_t> rows = stages_x + ring.stage * Tile::kStageX;
        wgmma_begin();
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          wgmma_f32<Input>(sums, left[block], wgmma_operand(rows, 32 * block),
                           block > 0 || !begins);
        }
        wgmma_commit();
        ring.next();
        if (--left_in_group == 0) {
          index = index + 1 < groups ? index + 1 : 0;  // the next part begins anew
          ahead = packed_linear_group(args, first_n, index);
        }
      };
      uint32_t even[4][4], odd[4][4];
      for (int step = 0; step < steps; step += 2) {
        multiply_step(step, even);
        if (step + 1 < steps) multiply_step(step + 1, odd);
      }
      wgmma_wait<0>();
      if (steps > 1) release(2);
      release(1);
      fold();

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = first_n + 8 * half;
        const float bias = args.bias != nullptr && n < args.N ? load_nc<float>(args.bias, n) : 0.0f;
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i) {
          const int m = first_m + i / 2 * 8 + lane % 4 * 2 + i % 2;
          const float value = totals[i / 2 * 4 + 2 * half + i % 2] + bias;
          if (m < args.M && n < args.N) {
            store_float(args.y, args.y_type, int64_t{m} * args.N + n,
                        activate(value, args.activation));
          }
        }
      }
    }
  }
}

// What the kernel is written for.
template <int kBits, class Input>
constexpr bool kPackedLinearHopper = kBits == 4 && sizeof(Input) == 2;

// Whether the kernel is there, a group is whole steps, and TMA's coordinates hold. The weight lies
// on 16 bytes.
template <int kBits, class Input>
bool packed_linear_fits_wgmma(int64_t M, int64_t N, int64_t K, int64_t parts, int64_t group_size,
                              int capability) {
  constexpr int64_t kMost = 0x7fffffff - 256;
  return kBuiltForSm90a && kPackedLinearHopper<kBits, Input> && capability == 90 && K > 0 &&
         (group_size >= K || group_size % kStepK == 0) && M <= kMost / parts && N <= kMost;
}

template <class Input>
cudaError_t launch_packed_linear_wgmma(const PackedLinearArgs<Input>& args, int64_t tiles,
                                       int64_t multiprocessors, cudaStream_t stream) {
  using Tile = PackedLinearWgmma;
  TensorMap x_map, codes_map;
  cudaError_t error =
      make_tensor_map<Input>(args.x, args.parts * args.M, args.x_columns, args.x_row_stride,
                             Tile::kBlockM, kStepK, true, &x_map);
  if (error != cudaSuccess) return error;
  const int64_t words = ceil_div<int64_t>(args.K, kStepK) * 4 * kWarpSize;
  error =
      make_tensor_map<uint32_t>(view_as<const uint32_t>(args.weight), ceil_div<int64_t>(args.N, 16),
                                words, words, Tile::kWarps, 4 * kWarpSize, false, &codes_map);
  if (error != cudaSuccess) return error;
  const int64_t blocks = tiles < multiprocessors ? tiles : multiprocessors;
  return launch(packed_linear_wgmma<Input>, dim3(static_cast<unsigned>(blocks)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, args, x_map, codes_map);
}

}  // namespace compressops
