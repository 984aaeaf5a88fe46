// int4_linear, ternary_linear: y[M, N] = activation(x_scale[m] · Σ_groups scale[group, n] ·
// Σ_k x[m, k] · (code[n, k] − zero[group, n]) + bias[n]), x in int8 (W4A8, W2A8), or in float16 or
// bfloat16 with x_scale 1 (W4A16). Kernels on mma.sync (sm_80 and newer), or wgmma:
//
//   few rows, M ≤ 8 or 16: the N·K·bits/8 bytes of codes are all the traffic that counts. 4 to 16
//       warps of a block take different inputs of the same 64 or 32 outputs, each with copies of
//       its own, so that none waits for another before the end. A multiprocessor of an H200
//       receives 36 GB/s ≈ 20 bytes a clock, and wants 25 KB under way for 700 ns of latency; 16
//       warps have 64 KB. What is left is to issue few instructions, and of those that go at half
//       rate (shifts and logic) fewer yet: docs/GPU_STATUS.md counts them.
//   wide: 64 × 128 outputs a block, and each code is unpacked once in it. Per 64 inputs come in
//       8 KB of 16-bit x (4 KB of int8) and 4 KB of 4-bit codes (2 KB) for 524,288 multiply-adds.
//   wgmma: 16-bit x and many rows on Hopper, see packed_linear_wgmma.cuh.
//
// The weight is the left operand of a product, 16 outputs, and 8 rows of x are the right one: with
// rows on the left, half of the product would be padding at M ≤ 8. Codes lie in the order of the
// fragments (Codes.pack_fragments in ops/packed_linear.py): a lane fetches the 16 bytes that it
// multiplies, so that they need no barrier and no shuffle. A group's sum is scaled in float32,
// never the weight: integers −15 … 15 are exact in every format.
#pragma once

#include "packed_linear_args.cuh"
#include "packed_linear_operands.cuh"
#include "ptx.cuh"
#include "split_sums.cuh"
#include "tiles.cuh"

namespace compressops {

// A warp computes 8 kTilesM rows × 16 kTilesN outputs. kWarpsN of them, side by side, are a team,
// which shares rows of x. The teams of a block, as many as the launch says, take different inputs
// of the same outputs. kStages steps of a team are in shared memory.
template <int kTilesM_, int kTilesN_, int kWarpsN_, int kMaxTeams_, int kStages_>
struct PackedLinearTile {
  static constexpr int kTilesM = kTilesM_, kTilesN = kTilesN_, kStages = kStages_;
  static constexpr int kWarpsN = kWarpsN_, kMaxTeams = kMaxTeams_;
  static constexpr int kWarpN = 16 * kTilesN, kTeam = kWarpsN * kWarpSize;
  static constexpr int kBlockM = 8 * kTilesM, kBlockN = kWarpN * kWarpsN;
  // Of a row of sums in shared memory: what a warp writes at once falls in different banks.
  static constexpr int kRowFloats = kBlockN + 4;

  template <class Input>
  static constexpr int kStageX = kBlockM * PackedLinearOperands<Input>::kRowChunks;
  template <int kBits>
  static constexpr int kStageCodes = kTeam * (2 * kTilesN / kLaneOutputs<kBits>);
  template <class Input, int kBits>
  static constexpr int kStage = kStageX<Input> + kStageCodes<kBits>;
  // Chunks of 16 bytes: of the stages, and later of the sums.
  template <class Input, int kBits>
  static constexpr int kTeamChunks =
      kStages * kStage<Input, kBits> > kBlockM* kRowFloats / 4 ? kStages * kStage<Input, kBits>
                                                               : kBlockM * kRowFloats / 4;
};

// Steps that a team takes one after the other, so that a group of 128 inputs is one team's.
constexpr int kRunSteps = 2;

// kUnit: inputs between which the group does not change.
template <class Input, int kBits, class Tile, int kUnit>
__global__ void __launch_bounds__(Tile::kTeam* Tile::kMaxTeams, 1)
    packed_linear(PackedLinearArgs<Input> args) {
  using Operands = PackedLinearOperands<Input>;
  using Sum = typename Operands::Sum;
  constexpr int kTilesM = Tile::kTilesM, kTilesN = Tile::kTilesN, kStages = Tile::kStages;
  constexpr int kChunks = Operands::kChunks, kTeam = Tile::kTeam, kLaneColumns = 2 * kTilesN;
  constexpr int kOutputs = kLaneOutputs<kBits>, kPieces = kLaneColumns / kOutputs;
  constexpr int kWords = 4 / kOutputs, kWordBlocks = 4 / kWords;  // blocks in a word
  constexpr int kBlocks = sizeof(Input) == 1 && kUnit > 16 ? 2 : 1;
  // Zero points of integers are taken off a group's sums, by the sum of x: a product more a block
  // for each row tile, where to centre the codes takes instructions for each output.
  constexpr bool kSumX = sizeof(Input) == 1 && kTilesM <= 2;
  constexpr int kStageX = Tile::template kStageX<Input>;
  constexpr int kStageCodes = Tile::template kStageCodes<kBits>;
  constexpr int kStage = kStageX + kStageCodes;
  constexpr int kTeamChunks = Tile::template kTeamChunks<Input, kBits>;
  static_assert(Tile::kWarpsN == 1 || Tile::kMaxTeams == 1);  // sync_team
  const int teams = static_cast<int>(blockDim.x / kTeam);
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, teams * kTeamChunks * 16);

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int team = static_cast<int>(threadIdx.x / kTeam);
  const int member = static_cast<int>(threadIdx.x % kTeam);
  const int warp_n = static_cast<int>(threadIdx.x % kTeam / kWarpSize);
  const Shared<int4> team_shared = slice(shared, team * kTeamChunks, kTeamChunks);
  const auto sync_team = [] {
    if constexpr (Tile::kWarpsN == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };
  const int64_t tile = blockIdx.x / args.splits, split = blockIdx.x % args.splits;
  int64_t tile_m, tile_n;
  tile_of_block(tile, ceil_div<int64_t>(args.M, Tile::kBlockM),
                ceil_div<int64_t>(args.N, Tile::kBlockN), &tile_m, &tile_n);
  const int64_t first_m = tile_m * Tile::kBlockM;
  const int64_t first_n = tile_n * Tile::kBlockN + warp_n * Tile::kWarpN;
  const int steps_k = static_cast<int>(ceil_div<int64_t>(args.K, kStepK));
  const int64_t steps = steps_k * args.parts, runs = ceil_div<int64_t>(steps, kRunSteps);
  const int first_run = static_cast<int>(runs * split / args.splits) + team;
  const int end = static_cast<int>(min(runs * (split + 1) / args.splits * kRunSteps, steps));
  const int first_step = first_run * kRunSteps;
  const int to_next_run = kRunSteps * (teams - 1) + 1;
  const auto after = [&](int step) {
    return step + ((static_cast<unsigned>(step) + 1) % kRunSteps ? 1 : to_next_run);
  };

  // What does not change from step to step is computed here: instructions are the limit.
  const bool one_part = args.parts == 1;
  const int outputs = static_cast<int>(min(args.N - first_n, int64_t{Tile::kWarpN}));
  const bool all_outputs = outputs == Tile::kWarpN;
  // A thread copies chunk `chunk` of the rows copy_row, + kCopyRows, …
  constexpr int kCopyRows = kTeam / kChunks, kChunkInputs = 16 / sizeof(Input);
  const int copy_row = static_cast<int>(threadIdx.x % kTeam / kChunks);
  const int chunk = static_cast<int>(threadIdx.x % kChunks);
  const int64_t copy_m = first_m + copy_row;
  const Global<const Input> x = args.x + (copy_m * args.x_row_stride + chunk * kChunkInputs);
  const int rows = opaque(static_cast<int>(min(args.M - copy_m, int64_t{Tile::kBlockM})));
  const int columns = static_cast<int>(args.x_columns) - chunk * kChunkInputs;
  const int codes_row = steps_k * kWarpSize;  // of a piece of the outputs
  const Global<const int4> codes =
      args.weight + (first_n / (8 * kOutputs) * int64_t{codes_row} + lane);
  // kWhole: all the inputs and outputs are there, of one part.
  const auto copy_x = [&]<bool kWhole>(int step, int stage, std::bool_constant<kWhole>) {
    const Shared<int4> stage_x = slice(team_shared, stage * kStage, kStageX);
    const int part = kWhole ? 0 : step / steps_k;
    const int step_k = kWhole ? step : step - part * steps_k;
    const Global<const Input> of_step = x + step_k * kStepK;
#pragma unroll
    for (int i = 0; i < Tile::kBlockM / kCopyRows; ++i) {
      Global<const Input> source = of_step + i * kCopyRows * args.x_row_stride;
      bool valid = i * kCopyRows < rows;
      if constexpr (!kWhole) {
        valid = valid && step_k * kStepK < columns;
        source = source + part * args.M * args.x_row_stride;
      }
      cp_async_16(stage_x + ((copy_row + i * kCopyRows) * Operands::kRowChunks + chunk),
                  view_as<const int4>(source), valid);
    }
  };
  const auto copy_codes = [&]<bool kWhole>(int step, int stage, std::bool_constant<kWhole>) {
    const Shared<int4> stage_codes = slice(team_shared, stage * kStage + kStageX, kStageCodes);
    const Global<const int4> codes_of_step = codes + (kWhole ? step : step % steps_k) * kWarpSize;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      cp_async_16(stage_codes + (piece * kTeam + member), codes_of_step + piece * codes_row,
                  kWhole || 8 * kOutputs * piece < outputs);
    }
  };
  const int whole_end = all_outputs && one_part ? static_cast<int>(args.x_columns / kStepK) : 0;
  const auto load = [&](int step, int stage, const auto&... copies) {
    if (step < min(whole_end, end)) {
      (copies(step, stage, std::true_type()), ...);
    } else if (step < end) {
      (copies(step, stage, std::false_type()), ...);
    }
  };

  // Of the group whose sums are being taken, and of the one after it, fetched ahead: a lane's
  // outputs lane / 4, 8 + lane / 4, …
  struct Group {
    int index = -1;
    float scales[kLaneColumns];
    uint32_t zeros[ceil_div(kLaneColumns, 4)] = {};  // four in a word: so much is there twice
  } current, ahead;
#pragma unroll
  for (uint32_t& four : ahead.zeros) four = kMiddleCode<kBits> * 0x01010101u;
  uint32_t zero_words[kLaneColumns];
#pragma unroll
  for (uint32_t& word : zero_words) word = Operands::zero_word(kMiddleCode<kBits>, 0);
  const auto fetch_columns = [&](Group& group, int index, const auto& valid) {
    group.index = index;
    const int64_t row = opaque(index * args.N + first_n + lane / 4);
    const Global<const float> scales = args.scales + row;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      group.scales[c] = valid(8 * c) ? load_nc<float>(scales, 8 * c) : 0.0f;
    }
    if (!kHasZeros<kBits> || args.zeros == nullptr) return;
    const Global<const uint8_t> zero_points = args.zeros + row;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const uint32_t zero =
          valid(8 * c) ? load_nc<uint8_t>(zero_points, 8 * c) : kMiddleCode<kBits>;
      group.zeros[c / 4] = (c % 4 ? group.zeros[c / 4] : 0) | zero << 8 * (c % 4);
    }
  };
  const auto fetch = [&](Group& group, int index) {
    if (all_outputs) {  // without a predicate for each
      fetch_columns(group, index, [](int) { return true; });
    } else {
      fetch_columns(group, index, [&](int column) { return column < outputs - lane / 4; });
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

  Sum sums[kTilesM][kTilesN][4] = {}, x_sums[kTilesM][4] = {};
  float totals[kTilesM][kTilesN][4] = {};
  const auto fold = [&] {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          Sum sum = sums[i][j][r];
          if constexpr (kSumX) {
            const int c = 2 * j + r / 2;
            const uint32_t zero =
                kHasZeros<kBits> ? current.zeros[c / 4] >> 8 * (c % 4) & 0xffu : kMiddleCode<kBits>;
            sum -= static_cast<int>(zero) * x_sums[i][r];
          }
          totals[i][j][r] += current.scales[2 * j + r / 2] * static_cast<float>(sum);
          sums[i][j][r] = 0;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) x_sums[i][r] = 0;
    }
  };

  // Codes and scales are there before the kernel that writes x has ended.
  int copied = first_step;
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i, copied = after(copied)) load(copied, i, copy_codes);
  if (first_step < end) fetch(ahead, group_of(first_step, 0));
  wait_for_kernel_before();
  copied = first_step;
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i, copied = after(copied)) {
    load(copied, i, copy_x);
    cp_async_commit();  // also when empty: the waits below count groups
  }
  int stage = 0;
  for (int step = first_step; step < end; copied = after(copied)) {
    cp_async_wait<kStages - 2>();
    sync_team();  // everyone's x of this step is there, and the stage before is free
    load(copied, stage == 0 ? kStages - 1 : stage - 1, copy_x, copy_codes);
    cp_async_commit();

    const Shared<int4> stage_x = slice(team_shared, stage * kStage, kStageX);
    uint32_t words[kPieces][4];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int4 four = team_shared[stage * kStage + kStageX + piece * kTeam + member];
      words[piece][0] = static_cast<uint32_t>(four.x);
      words[piece][1] = static_cast<uint32_t>(four.y);
      words[piece][2] = static_cast<uint32_t>(four.z);
      words[piece][3] = static_cast<uint32_t>(four.w);
    }
    const int next_step = after(step);
#pragma unroll
    for (int unit = 0; unit < kStepK / kUnit; ++unit) {
      if (ahead.index != current.index) {
        if (current.index >= 0) fold();
        current = ahead;
        if (!kSumX && kHasZeros<kBits> && args.zeros != nullptr) {
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) {
            zero_words[c] = Operands::zero_word(current.zeros[c / 4], c % 4);
          }
        }
      }
      const bool last = unit + 1 == kStepK / kUnit;
      const int of_next = last ? next_step : step;
      if (of_next < end) {
        const int next = group_of(of_next, last ? 0 : unit + 1);
        if (next != current.index) fetch(ahead, next);
      }
#pragma unroll
      for (int block = unit * kUnit / 16; block < (unit + 1) * kUnit / 16; block += kBlocks) {
        uint32_t right[kTilesM][2];
        Operands::template load<kTilesM>(stage_x, block, lane, right);
        if constexpr (kSumX) {
          constexpr uint32_t kOnes[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            Operands::template multiply<kBlocks>(x_sums[i], kOnes, right[i]);
          }
        }
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          uint32_t left[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int c = 2 * j + half;
            const uint32_t word = words[c / kOutputs][c % kOutputs * kWords + block / kWordBlocks];
            Operands::template unpack<kBits, !kSumX>(word, kBits * (block % kWordBlocks),
                                                     zero_words[c], &left[half], &left[2 + half]);
          }
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            Operands::template multiply<kBlocks>(sums[i][j], left, right[i]);
          }
        }
      }
    }
    step = next_step;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  if (current.index >= 0) fold();
  cp_async_wait<0>();
  sync_team();  // the stages are free

  const Shared<float> team_sums = view_as<float>(team_shared);
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 8 * i + 2 * (lane % 4) + r % 2;
        const int column = warp_n * Tile::kWarpN + 16 * j + 8 * (r / 2) + lane / 4;
        team_sums[row * Tile::kRowFloats + column] = totals[i][j][r];
      }
    }
  }
  __syncthreads();

  const int elements =
      static_cast<int>(min(args.M - first_m, int64_t{Tile::kBlockM})) * Tile::kBlockN;
  const auto store = [&](int e, float total) {
    const int64_t m = first_m + e / Tile::kBlockN;
    const int64_t n = tile_n * Tile::kBlockN + e % Tile::kBlockN;
    if (n >= args.N) return;
    const float x_scale = args.x_scales == nullptr ? 1.0f : args.x_scales[m];
    const float bias = args.bias == nullptr ? 0.0f : args.bias[n];
    store_float(args.y, args.y_type, m * args.N + n,
                activate(total * x_scale + bias, args.activation));
  };
  const auto partial = [&](int64_t of_split, int e) {
    return (tile * args.splits + of_split) * (Tile::kBlockM * Tile::kBlockN) + e;
  };
  const Shared<float> all_sums = view_as<float>(shared);
  for (int e = thread; e < elements; e += static_cast<int>(blockDim.x)) {
    const int at = e / Tile::kBlockN * Tile::kRowFloats + e % Tile::kBlockN;
    float total = all_sums[at];
    for (int other = 1; other < teams; ++other) total += all_sums[other * kTeamChunks * 4 + at];
    if (args.splits == 1) {
      store(e, total);
    } else {
      args.partials[partial(split, e)] = total;
    }
  }
  if (args.splits == 1) return;

  // The block that comes last adds the sums of all, in the order of the inputs, so that which one
  // it is does not show.
  if (!comes_last(args.tickets, tile, args.splits)) return;
  for (int e = thread; e < elements; e += static_cast<int>(blockDim.x)) {
    float total = 0.0f;
    for (int64_t i = 0; i < args.splits; ++i) {
      total += load_cg<float>(args.partials, partial(i, e));
    }
    store(e, total);
  }
}

}  // namespace compressops
