// int4_linear, ternary_linear: y[M, N] = activation(x_scale[m] · Σ_groups scale[group, n] ·
// Σ_k x[m, k] · (code[n, k] − zero[group, n]) + bias[n]), x in int8 (W4A8, W2A8), or in float16 or
// bfloat16 with x_scale 1 (W4A16). A kernel on mma.sync (sm_80 and newer), narrow or wide, or
// wgmma:
//
//   narrow, M ≤ 16: the N·K·bits/8 bytes of codes are all the traffic that counts. Four warps of a
//       block take different inputs of the same 64 outputs, and blocks split the inputs further.
//       A multiprocessor of an H200 receives 36 GB/s ≈ 20 bytes a clock, 40 codes of 4 bits; to
//       unpack them takes 1 instruction of a thread a code in 16 bits (a shift for two words, and
//       a logical and a subtraction for two codes), of 128 a clock, and the 16 padded rows 40 · 16
//       of 1024 multiply-adds a clock. 20 bytes a clock over 1000 clocks of latency are 20 KB under
//       way; three stages of 8 KB of each of two blocks are 48 KB. In all a step takes 900
//       instructions of a warp, twice what the bandwidth leaves time for (docs/GPU_STATUS.md).
//   wide: 64 × 128 outputs a block, and each code is unpacked once in it. Per 64 inputs come in
//       8 KB of 16-bit x (4 KB of int8) and 4 KB of 4-bit codes (2 KB) for 524,288 multiply-adds.
//   wgmma: 16-bit x and many rows on Hopper, see packed_linear_wgmma.cuh.
//
// Codes lie in the order of the fragments (Codes.pack_fragments in ops/packed_linear.py): a lane
// fetches the 16 bytes that it multiplies, so that they need no barrier and no shuffle. A group's
// sum is scaled in float32, never the weight: integers −15 … 15 are exact in every format.
#pragma once

#include "activation.cuh"
#include "device.cuh"
#include "float_type.cuh"
#include "packed_linear_operands.cuh"
#include "ptx.cuh"
#include "tiles.cuh"

namespace compressops {

constexpr int kStepK = 64;  // inputs of a tile of codes
// Groups are a multiple of it, as ops/packed_linear.py asks.
constexpr int64_t kGroupMultiple = 16;
// The sums of |q| ≤ 127 times |code − zero| ≤ 15 must fit 31 bits; the ops ask for no more.
constexpr int64_t kPackedLinearMaxK = 131072;
static_assert(kPackedLinearMaxK * 127 * 15 <= 0x7fffffff);

template <class Input>
struct PackedLinearArgs {
  int64_t M, N, K;
  // [parts][M, x_columns], rows on 16 bytes and x_row_stride elements apart; x_columns is a whole
  // number of 16 bytes. x is the sum of its parts.
  Global<const Input> x;
  int64_t x_row_stride, x_columns, parts;
  Global<const float> x_scales;  // [M] or null: 1
  Global<const int4> weight;     // [ceil(N / rows), ceil(K / 64), 32 lanes], rows 16 or 32
  Global<const float> scales;    // [groups, N]
  Global<const uint8_t> zeros;   // [groups, N] or null: the middle code
  int64_t group_size;            // K or less
  Global<const float> bias;      // [N] or null
  Activation activation;
  int64_t splits;
  Global<float> partials;    // scratch, see packed_linear_partials; null for one split
  Global<unsigned> tickets;  // zeros, one a tile; null for one split
  FloatType y_type;
  Global<uint8_t> y;  // [M, N]
};

template <int kBits>
constexpr uint32_t kMiddleCode = kBits == 4 ? 8 : 1;
template <int kBits>
constexpr int kLaneOutputs = kBits == 4 ? 2 : 4;  // of a lane in a tile of codes

// A block computes 16 kTilesM × 8 kTilesN kWarpsN outputs; kWarpsK of its warps take different
// steps of inputs for the same outputs. kStages rounds of steps are in shared memory.
template <int kTilesM_, int kTilesN_, int kWarpsK_, int kWarpsN_, int kStages_>
struct PackedLinearTile {
  static constexpr int kTilesM = kTilesM_, kTilesN = kTilesN_, kStages = kStages_;
  static constexpr int kWarpsK = kWarpsK_, kWarpsN = kWarpsN_;
  static constexpr int kWarpN = 8 * kTilesN;
  static constexpr int kBlockM = 16 * kTilesM, kBlockN = kWarpN * kWarpsN;
  static constexpr int kThreads = kWarpsK * kWarpsN * kWarpSize;
  static constexpr int kSums = kTilesM * kTilesN * 4;  // of a thread

  template <class Input>
  static constexpr int kStageX = kWarpsK * kBlockM * PackedLinearOperands<Input>::kChunks;
  template <int kBits>
  static constexpr int kStageCodes = kThreads * (kTilesN / kLaneOutputs<kBits>);
  template <class Input, int kBits>
  static constexpr int kSharedBytes = kStages * (kStageX<Input> + kStageCodes<kBits>)*16;
};

// kUnit: inputs between which the group does not change.
template <class Input, int kBits, class Tile, int kUnit>
__global__ void __launch_bounds__(Tile::kThreads) packed_linear(PackedLinearArgs<Input> args) {
  using Operands = PackedLinearOperands<Input>;
  using Sum = typename Operands::Sum;
  constexpr int kTilesM = Tile::kTilesM, kTilesN = Tile::kTilesN, kStages = Tile::kStages;
  constexpr int kWarpsK = Tile::kWarpsK, kChunks = Operands::kChunks;
  constexpr int kOutputs = kLaneOutputs<kBits>, kPieces = kTilesN / kOutputs;
  constexpr int kWords = 4 / kOutputs, kWordBlocks = 4 / kWords;  // blocks in a word
  constexpr int kBlocks = sizeof(Input) == 1 && kUnit > 16 ? 2 : 1;
  constexpr int kStageX = Tile::template kStageX<Input>;
  constexpr int kStageCodes = Tile::template kStageCodes<kBits>;
  constexpr int kBytes = Tile::template kSharedBytes<Input, kBits>;
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, kBytes);
  const Shared<int4> shared_x = slice(shared, 0, kStages * kStageX);
  const Shared<int4> shared_codes = slice(shared, kStages * kStageX, kStages * kStageCodes);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp_k = thread / kWarpSize % kWarpsK, warp_n = thread / kWarpSize / kWarpsK;
  const int64_t tile = blockIdx.x / args.splits, split = blockIdx.x % args.splits;
  int64_t tile_m, tile_n;
  tile_of_block(tile, ceil_div<int64_t>(args.M, Tile::kBlockM),
                ceil_div<int64_t>(args.N, Tile::kBlockN), &tile_m, &tile_n);
  const int64_t first_m = tile_m * Tile::kBlockM;
  const int64_t first_n = tile_n * Tile::kBlockN + warp_n * Tile::kWarpN;
  const int steps_k = static_cast<int>(ceil_div<int64_t>(args.K, kStepK));
  const int64_t steps = steps_k * args.parts;
  const int begin = static_cast<int>(steps * split / args.splits);
  const int end = static_cast<int>(steps * (split + 1) / args.splits);
  const int rounds = ceil_div(end - begin, kWarpsK);
  const int group_size = static_cast<int>(args.group_size), K = static_cast<int>(args.K);

  const auto load_round = [&](int round) {
    const int stage = round % kStages;
    const Shared<int4> stage_x = slice(shared_x, stage * kStageX, kStageX);
    const Shared<int4> stage_codes = slice(shared_codes, stage * kStageCodes, kStageCodes);
#pragma unroll
    for (int i = 0; i < kStageX / Tile::kThreads; ++i) {
      const int index = i * Tile::kThreads + thread;
      const int row = index / kChunks, chunk = index % kChunks;  // rows of all the warps' steps
      const int step = begin + round * kWarpsK + row / Tile::kBlockM;
      const int64_t m = first_m + row % Tile::kBlockM;
      const int64_t k = step % steps_k * kStepK + chunk * (16 / static_cast<int>(sizeof(Input)));
      const bool valid = step < end && m < args.M && k < args.x_columns;
      const int64_t source = (step / steps_k * args.M + m) * args.x_row_stride + k;
      cp_async_16(stage_x + Operands::place(row, chunk),
                  view_as<const int4>(args.x + (valid ? source : 0)), valid);
    }
    const int step = begin + round * kWarpsK + warp_k;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int64_t n = first_n + 8 * kOutputs * piece;
      const bool valid = step < end && n < args.N;
      const int64_t source = (n / (8 * kOutputs) * steps_k + step % steps_k) * kWarpSize + lane;
      cp_async_16(stage_codes + (piece * Tile::kThreads + thread),
                  args.weight + (valid ? source : 0), valid);
    }
  };

  // Of the group whose sums are being taken, and of the one after it, fetched ahead.
  struct Group {
    int index = -1;
    float scales[kTilesN][2];
    uint32_t zeros[kTilesN / 4] = {};  // four in a word: this much is in registers twice
  } current, ahead;
  uint32_t zeros[kTilesN];
  const auto fetch = [&](Group& group, int index) {
    group.index = index;
    const int64_t row = int64_t{index} * args.N;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int64_t n = first_n + 8 * j;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t column = n + 2 * (lane % 4) + odd;
        group.scales[j][odd] = column < args.N ? load_nc<float>(args.scales, row + column) : 0.0f;
      }
      const int64_t column = n + lane / 4;
      const bool given = args.zeros != nullptr && column < args.N;
      const uint32_t zero = given ? load_nc<uint8_t>(args.zeros, row + column) : kMiddleCode<kBits>;
      group.zeros[j / 4] = (j % 4 ? group.zeros[j / 4] : 0) | zero << 8 * (j % 4);
    }
  };
  // Where a unit of a step begins; past the last input all counts 0 times, whatever its group.
  const auto group_of = [&](int step, int unit) {
    return min(step % steps_k * kStepK + unit * kUnit, K - 1) / group_size;
  };

  Sum sums[kTilesM][kTilesN][4] = {};
  float totals[kTilesM][kTilesN][4] = {};
  const auto fold = [&] {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          totals[i][j][r] += current.scales[j][r % 2] * static_cast<float>(sums[i][j][r]);
          sums[i][j][r] = 0;
        }
      }
    }
  };

#pragma unroll
  for (int round = 0; round < kStages - 1; ++round) {
    if (round < rounds) load_round(round);
    cp_async_commit();  // also when empty: the waits below count groups
  }
  if (begin + warp_k < end) fetch(ahead, group_of(begin + warp_k, 0));
  for (int round = 0; round < rounds; ++round) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // everyone's x of this round is there, and the stage before is free
    if (round + kStages - 1 < rounds) load_round(round + kStages - 1);
    cp_async_commit();

    const int step = begin + round * kWarpsK + warp_k;
    if (step >= end) continue;
    const int stage = round % kStages;
    const Shared<int4> stage_x =
        slice(shared_x, stage * kStageX + warp_k * (kStageX / kWarpsK), kStageX / kWarpsK);
    uint32_t words[kPieces][4];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int4 codes = shared_codes[stage * kStageCodes + piece * Tile::kThreads + thread];
      words[piece][0] = static_cast<uint32_t>(codes.x);
      words[piece][1] = static_cast<uint32_t>(codes.y);
      words[piece][2] = static_cast<uint32_t>(codes.z);
      words[piece][3] = static_cast<uint32_t>(codes.w);
    }
#pragma unroll
    for (int unit = 0; unit < kStepK / kUnit; ++unit) {
      if (ahead.index != current.index) {
        if (current.index >= 0) fold();
        current = ahead;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          zeros[j] = Operands::zero_word(current.zeros[j / 4] >> 8 * (j % 4) & 0xffu);
        }
      }
      const bool last = unit + 1 == kStepK / kUnit;
      const int next_step = last ? step + kWarpsK : step;
      if (next_step < end) {
        const int next = group_of(next_step, last ? 0 : unit + 1);
        if (next != current.index) fetch(ahead, next);
      }
#pragma unroll
      for (int block = unit * kUnit / 16; block < (unit + 1) * kUnit / 16; block += kBlocks) {
        uint32_t left[kTilesM][4];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) Operands::load(stage_x, 16 * i, block, lane, left[i]);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          const uint32_t word = words[j / kOutputs][j % kOutputs * kWords + block / kWordBlocks];
          const int shift = kBits * (block % kWordBlocks);
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            Operands::template multiply<kBits, kBlocks>(sums[i][j], left[i], word, shift, block,
                                                        zeros[j]);
          }
        }
      }
    }
  }
  if (current.index >= 0) fold();
  cp_async_wait<0>();

  if constexpr (kWarpsK > 1) {
    // The first warp adds the others' sums, in their order.
    constexpr int kOthers = (kWarpsK - 1) * Tile::kWarpsN * kWarpSize;
    static_assert(kOthers * Tile::kSums * 4 <= kBytes);
    const Shared<float> others = view_as<float>(shared);
    __syncthreads();  // the stages are free
    const int column = warp_n * kWarpSize + lane;
#pragma unroll
    for (int e = 0; e < Tile::kSums; ++e) {
      if (warp_k > 0) {
        others[e * kOthers + (warp_k - 1) * Tile::kWarpsN * kWarpSize + column] =
            totals[e / 4 / kTilesN][e / 4 % kTilesN][e % 4];
      }
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < Tile::kSums; ++e) {
      if (warp_k > 0) continue;
#pragma unroll
      for (int other = 0; other < kWarpsK - 1; ++other) {
        const float sum = others[e * kOthers + other * Tile::kWarpsN * kWarpSize + column];
        totals[e / 4 / kTilesN][e / 4 % kTilesN][e % 4] += sum;
      }
    }
  }

  if (args.splits > 1) {
    // The block that comes last adds the sums of all, in the order of the inputs, so that which
    // one it is does not show.
    constexpr int kColumns = Tile::kWarpsN * kWarpSize;
    const int column = warp_n * kWarpSize + lane;
    const auto partial = [&](int64_t of_split, int e) {
      return ((tile * args.splits + of_split) * Tile::kSums + e) * kColumns + column;
    };
#pragma unroll
    for (int e = 0; e < Tile::kSums; ++e) {
      const int64_t m = first_m + 16 * (e / 4 / kTilesN) + 8 * (e % 4 / 2) + lane / 4;
      if (warp_k == 0 && m < args.M) {
        args.partials[partial(split, e)] = totals[e / 4 / kTilesN][e / 4 % kTilesN][e % 4];
      }
    }
    COMPRESSOPS_SHARED_ARRAY(int, is_last, 1);
    __threadfence();
    __syncthreads();
    if (thread == 0) is_last[0] = atomicAdd(args.tickets + tile, 1u) + 1 == args.splits;
    __syncthreads();
    if (!is_last[0]) return;
    __threadfence();
#pragma unroll
    for (int e = 0; e < Tile::kSums; ++e) {
      const int64_t m = first_m + 16 * (e / 4 / kTilesN) + 8 * (e % 4 / 2) + lane / 4;
      if (warp_k > 0 || m >= args.M) continue;
      float total = 0.0f;
      for (int64_t i = 0; i < args.splits; ++i) {
        total += load_cg<float>(args.partials, partial(i, e));
      }
      totals[e / 4 / kTilesN][e / 4 % kTilesN][e % 4] = total;
    }
  }

  if (warp_k > 0) return;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = first_m + 16 * i + 8 * half + lane / 4;
      if (m >= args.M) continue;
      const float x_scale = args.x_scales == nullptr ? 1.0f : args.x_scales[m];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int64_t n = first_n + 8 * j + 2 * (lane % 4) + odd;
          if (n >= args.N) continue;
          const float bias = args.bias == nullptr ? 0.0f : args.bias[n];
          const float value = totals[i][j][2 * half + odd] * x_scale + bias;
          store_float(args.y, args.y_type, m * args.N + n, activate(value, args.activation));
        }
      }
    }
  }
}

}  // namespace compressops
