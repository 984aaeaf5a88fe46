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
//       way; three stages of 8 KB of each of two blocks are 48 KB. In all a step takes 434
//       instructions of a warp; the bandwidth leaves time for 410 (docs/GPU_STATUS.md).
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

  // What does not change from round to round is computed here: instructions are the limit.
  const bool one_part = args.parts == 1;
  // With more rows there are no registers for paths of their own.
  const bool all_outputs = kTilesM == 1 && first_n + Tile::kWarpN <= args.N;
  // A thread copies chunk `chunk` of the rows copy_row, + kCopyRows, … of all the warps' steps.
  constexpr int kCopyRows = Tile::kThreads / kChunks, kChunkInputs = 16 / sizeof(Input);
  static_assert(kCopyRows % 8 == 0);  // the period of Operands::place
  const int copy_row = thread / kChunks, chunk = thread % kChunks;
  const int copy_step = copy_row / Tile::kBlockM, copy_place = Operands::place(copy_row, chunk);
  const int64_t copy_m = first_m + copy_row % Tile::kBlockM;
  const Global<const Input> x = args.x + (copy_m * args.x_row_stride + chunk * kChunkInputs);
  const int rows = static_cast<int>(min(args.M - copy_m, int64_t{Tile::kBlockM}));
  const int columns = static_cast<int>(args.x_columns) - chunk * kChunkInputs;
  const int64_t codes_row = int64_t{steps_k} * kWarpSize;  // of a piece of the outputs
  const Global<const int4> codes = args.weight + (first_n / (8 * kOutputs) * codes_row + lane);
  // kWhole: all the inputs and outputs are there, of one part.
  const auto copy_round = [&]<bool kWhole>(int round, std::bool_constant<kWhole>) {
    const int stage = round % kStages, first = begin + round * kWarpsK;
    const Shared<int4> stage_x = slice(shared_x, stage * kStageX, kStageX);
    const Shared<int4> stage_codes = slice(shared_codes, stage * kStageCodes, kStageCodes);
    const Global<const Input> x_of_round = x + (first + copy_step) * kStepK;
#pragma unroll
    for (int i = 0; i < kStageX / Tile::kThreads; ++i) {
      const int later = i * kCopyRows / Tile::kBlockM, later_m = i * kCopyRows % Tile::kBlockM;
      Global<const Input> source = x_of_round + (later_m * args.x_row_stride + later * kStepK);
      bool valid = later_m < rows;
      if constexpr (!kWhole) {
        const int step = first + copy_step + later, part = step / steps_k;
        valid = valid && step < end && (step - part * steps_k) * kStepK < columns;
        source = source + part * (args.M * args.x_row_stride - steps_k * kStepK);
      }
      cp_async_16(stage_x + (copy_place + i * kCopyRows * kChunks), view_as<const int4>(source),
                  valid);
    }
    const int step = first + warp_k;
    const Global<const int4> of_step = codes + (kWhole ? step : step % steps_k) * kWarpSize;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      cp_async_16(stage_codes + (piece * Tile::kThreads + thread), of_step + piece * codes_row,
                  kWhole || (step < end && first_n + 8 * kOutputs * piece < args.N));
    }
  };
  const int whole_end = one_part ? min(end, static_cast<int>(args.x_columns / kStepK)) : 0;
  const auto load_round = [&](int round) {
    if (all_outputs && begin + (round + 1) * kWarpsK <= whole_end) {
      copy_round(round, std::true_type());
    } else {
      copy_round(round, std::false_type());
    }
  };

  // Of the group whose sums are being taken, and of the one after it, fetched ahead.
  struct Group {
    int index = -1;
    float scales[kTilesN][2];
    uint32_t zeros[kTilesN / 4] = {};  // four in a word: this much is in registers twice
  } current, ahead;
  uint32_t zeros[kTilesN];
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) zeros[j] = Operands::zero_word(kMiddleCode<kBits>);
  const auto fetch_columns = [&](Group& group, int index, const auto& valid) {
    group.index = index;
    const int64_t row = index * args.N + first_n;
    const Global<const float> scales = args.scales + (row + 2 * (lane % 4));
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        group.scales[j][odd] =
            valid(8 * j + 2 * (lane % 4) + odd) ? load_nc<float>(scales, 8 * j + odd) : 0.0f;
      }
    }
    if (args.zeros == nullptr) return;
    const Global<const uint8_t> zero_points = args.zeros + (row + lane / 4);
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const uint32_t zero =
          valid(8 * j + lane / 4) ? load_nc<uint8_t>(zero_points, 8 * j) : kMiddleCode<kBits>;
      group.zeros[j / 4] = (j % 4 ? group.zeros[j / 4] : 0) | zero << 8 * (j % 4);
    }
  };
  const auto fetch = [&](Group& group, int index) {
    if (all_outputs) {  // without a predicate for each
      fetch_columns(group, index, [](int) { return true; });
    } else {
      fetch_columns(group, index, [&](int column) { return first_n + column < args.N; });
    }
  };
  // The group of a unit of a step. A product in float32 rounds to the quotient: of numbers below
  // 2^14, half a unit from the next group. Past the last input all counts 0 times, whatever its.
  const bool one_group = args.group_size >= args.K;
  const int last_group = one_group ? 0 : static_cast<int>(ceil_div(args.K, args.group_size)) - 1;
  const float groups_a_unit =
      one_group ? 0.0f : static_cast<float>(kUnit) / static_cast<float>(args.group_size);
  const auto group_of = [&](int step, int unit) {
    const int units = (one_part ? step : step % steps_k) * (kStepK / kUnit) + unit;
    return min(static_cast<int>((static_cast<float>(units) + 0.5f) * groups_a_unit), last_group);
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

#pragma unroll 1
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
          if (args.zeros == nullptr) continue;
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
