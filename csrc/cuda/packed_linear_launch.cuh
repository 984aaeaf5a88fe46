// Which kernel of packed_linear.cuh serves a shape, its scratch, and its launch.
#pragma once

#include "pack_rows.cuh"
#include "packed_linear.cuh"
#include "packed_linear_wgmma.cuh"

namespace compressops {

// The tests force each.
enum class PackedLinearKernel : int { kAuto = -1, kRows8, kRows8Short, kRows16, kWide, kWgmma };

using PackedLinearRows8 = PackedLinearTile<1, 4, 1, 16, 3>;
using PackedLinearRows8Short = PackedLinearTile<1, 2, 1, 16, 4>;
using PackedLinearRows16 = PackedLinearTile<2, 4, 1, 8, 4>;
using PackedLinearWide = PackedLinearTile<8, 2, 4, 1, 4>;

// What of a device a plan depends on.
struct PackedLinearDevice {
  int64_t multiprocessors;
  int capability;        // as 10 major + minor
  int64_t shared_bytes;  // that a block may have
};

struct PackedLinearChoice {
  int capability;  // from this compute capability on
  bool hopper;     // needs wgmma
  int64_t max_m;   // serves M up to this
  PackedLinearKernel kernel;
  int64_t block_m, block_n;
  double min_tiles;        // serves only what makes so many tiles per multiprocessor
  int least_teams, teams;  // of a block, and all that a multiprocessor's registers hold
  int64_t team_bytes;      // of shared memory, at most
  bool splits;             // can split the inputs
};

template <class Tile>
constexpr int64_t kPackedLinearTeamBytes = 16 * Tile::template kTeamChunks<__half, 4>;

// The first row that fits; from counting bytes and instructions, not yet from measurements. Rows
// for later architectures go first.
constexpr PackedLinearChoice kPackedLinearChoices[] = {
    {80, false, 8, PackedLinearKernel::kRows8, 8, 64, 0.75, 4, 16,
     kPackedLinearTeamBytes<PackedLinearRows8>, true},
    {80, false, 8, PackedLinearKernel::kRows8Short, 8, 32, 0, 4, 16,
     kPackedLinearTeamBytes<PackedLinearRows8Short>, true},
    {80, false, 16, PackedLinearKernel::kRows16, 16, 64, 0, 4, 8,
     kPackedLinearTeamBytes<PackedLinearRows16>, true},
    {90, true, INT64_MAX, PackedLinearKernel::kWgmma, 128, 128, 1, 1, 1, 0, false},
    {80, false, INT64_MAX, PackedLinearKernel::kWide, 64, 128, 0, 1, 1,
     kPackedLinearTeamBytes<PackedLinearWide>, true},
};

struct PackedLinearPlan {
  PackedLinearKernel kernel;
  int64_t tiles, splits;
  int teams;         // of a block
  int64_t partials;  // floats of scratch
  bool early;        // begins before the kernel that writes x has ended
};

// How the blocks of a choice share the inputs: so that those that run at once fill the
// multiprocessors. A split costs a round through memory, and has to make up for it.
inline PackedLinearPlan share_inputs(const PackedLinearChoice& choice, int64_t tiles, int64_t steps,
                                     const PackedLinearDevice& device) {
  constexpr int64_t kLeastSteps = 2 * kRunSteps;  // of a team, or a block is not cut further
  constexpr double kGain = 1.15;
  PackedLinearPlan plan = {choice.kernel, tiles, 1, choice.least_teams, 0, false};
  double best = 0.0;
  const int64_t slots = choice.teams / choice.least_teams * device.multiprocessors;
  for (int64_t splits = 1; splits <= (choice.splits && tiles > 0 ? ceil_div(slots, tiles) : 1);
       ++splits) {
    for (int teams = choice.least_teams; teams <= choice.teams; teams *= 2) {
      const bool least = splits == 1 && teams == choice.least_teams;
      if (!least && (steps < kLeastSteps * teams * splits ||
                     choice.team_bytes * teams > device.shared_bytes)) {
        continue;
      }
      const int64_t by_shared = device.shared_bytes / (choice.team_bytes * teams + 1);
      const int64_t by_teams = choice.teams / teams;
      const int64_t at_once = (by_shared < 1          ? 1
                               : by_shared < by_teams ? by_shared
                                                      : by_teams) *
                              device.multiprocessors;
      const int64_t blocks = tiles * splits, rounds = ceil_div(blocks, at_once);
      if (splits > 1 && rounds > 1) continue;
      // Of the teams that could run, how many do.
      const double filled = static_cast<double>(blocks * teams) /
                            static_cast<double>(rounds * choice.teams * device.multiprocessors);
      if (filled > best * (splits == plan.splits ? 1.0 : kGain)) {
        best = filled;
        plan.splits = splits;
        plan.teams = teams;
      }
    }
  }
  return plan;
}

// `hopper`: whether wgmma may serve the operands.
inline PackedLinearPlan plan_packed_linear(int64_t M, int64_t N, int64_t K, int64_t parts,
                                           const PackedLinearDevice& device, bool hopper,
                                           PackedLinearKernel forced = PackedLinearKernel::kAuto,
                                           int64_t forced_splits = 0) {
  for (const PackedLinearChoice& choice : kPackedLinearChoices) {
    const bool automatic = forced == PackedLinearKernel::kAuto;
    if (automatic ? M > choice.max_m : forced != choice.kernel) continue;
    if (device.capability < choice.capability || (choice.hopper && !hopper)) continue;
    const int64_t tiles = ceil_div(M, choice.block_m) * ceil_div(N, choice.block_n);
    if (automatic && static_cast<double>(tiles) <
                         choice.min_tiles * static_cast<double>(device.multiprocessors)) {
      continue;
    }
    PackedLinearPlan plan =
        share_inputs(choice, tiles, ceil_div<int64_t>(K, kStepK) * parts, device);
    if (forced_splits > 0 && choice.splits) plan.splits = forced_splits;
    plan.partials = plan.splits > 1 ? tiles * plan.splits * choice.block_m * choice.block_n : 0;
    return plan;
  }
  return {PackedLinearKernel::kAuto, 0, 0, 0, 0, false};  // before sm_80
}

template <class Input, int kBits, class Tile>
cudaError_t launch_packed_linear_tile(const PackedLinearArgs<Input>& args,
                                      const PackedLinearPlan& plan, cudaStream_t stream) {
  if (plan.tiles * plan.splits > 0x7fffffff) return cudaErrorInvalidValue;
  // A row's only group may end anywhere.
  const bool whole = args.group_size >= args.K || args.group_size % kStepK == 0;
  const auto kernel = whole ? packed_linear<Input, kBits, Tile, kStepK>
                            : packed_linear<Input, kBits, Tile, static_cast<int>(kGroupMultiple)>;
  const dim3 grid(static_cast<unsigned>(plan.tiles * plan.splits));
  const dim3 block(static_cast<unsigned>(plan.teams * Tile::kTeam));
  const size_t bytes = plan.teams * Tile::template kTeamChunks<Input, kBits> * 16;
  return plan.early ? launch_early(kernel, grid, block, bytes, stream, args)
                    : launch(kernel, grid, block, bytes, stream, args);
}

template <int kBits, class Input>
cudaError_t launch_packed_linear(const PackedLinearArgs<Input>& args, const PackedLinearPlan& plan,
                                 int64_t multiprocessors, cudaStream_t stream) {
  if (args.M == 0 || args.N == 0) return cudaSuccess;
  switch (plan.kernel) {
    case PackedLinearKernel::kRows8:
      return launch_packed_linear_tile<Input, kBits, PackedLinearRows8>(args, plan, stream);
    case PackedLinearKernel::kRows8Short:
      return launch_packed_linear_tile<Input, kBits, PackedLinearRows8Short>(args, plan, stream);
    case PackedLinearKernel::kRows16:
      return launch_packed_linear_tile<Input, kBits, PackedLinearRows16>(args, plan, stream);
    case PackedLinearKernel::kWide:
      return launch_packed_linear_tile<Input, kBits, PackedLinearWide>(args, plan, stream);
    case PackedLinearKernel::kWgmma:
      if constexpr (kPackedLinearHopper<kBits, Input>) {
        return launch_packed_linear_wgmma(args, plan.tiles, multiprocessors, stream);
      }
      return cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace compressops
