// Which kernel of packed_linear.cuh serves a shape, its scratch, and its launch.
#pragma once

#include "pack_rows.cuh"
#include "packed_linear.cuh"
#include "packed_linear_wgmma.cuh"

namespace compressops {

// The tests force each.
enum class PackedLinearKernel : int { kAuto = -1, kNarrow, kWide, kWgmma };

using PackedLinearNarrow = PackedLinearTile<1, 8, 4, 1, 4>;
using PackedLinearWide = PackedLinearTile<4, 4, 1, 4, 4>;

struct PackedLinearChoice {
  int capability;  // from this compute capability on, as 10 major + minor
  bool hopper;     // needs wgmma
  int64_t max_m;   // serves M up to this
  PackedLinearKernel kernel;
  int64_t block_m, block_n;
  int64_t min_tiles;    // serves only what makes so many tiles per multiprocessor
  int64_t blocks;       // of a multiprocessor, that inputs are split for; 0: they are not
  int64_t least_steps;  // of 64 inputs that a split has
};

// The first row that fits; from counting bytes, not yet from measurements. Narrow: a
// multiprocessor's registers hold two blocks at once. Rows for later architectures go first.
constexpr PackedLinearChoice kPackedLinearChoices[] = {
    {80, false, 16, PackedLinearKernel::kNarrow, 16, 64, 0, 2, 8},
    {90, true, INT64_MAX, PackedLinearKernel::kWgmma, 128, 128, 1, 0, 1},
    {80, false, INT64_MAX, PackedLinearKernel::kWide, 64, 128, 0, 1, 8},
};

struct PackedLinearPlan {
  PackedLinearKernel kernel;
  int64_t tiles, splits;
  int64_t partials;  // floats of scratch
};

// `hopper`: whether wgmma may serve the operands.
inline PackedLinearPlan plan_packed_linear(int64_t M, int64_t N, int64_t K, int64_t parts,
                                           int64_t multiprocessors, int capability, bool hopper,
                                           PackedLinearKernel forced = PackedLinearKernel::kAuto,
                                           int64_t forced_splits = 0) {
  for (const PackedLinearChoice& choice : kPackedLinearChoices) {
    const bool automatic = forced == PackedLinearKernel::kAuto;
    if (automatic ? M > choice.max_m : forced != choice.kernel) continue;
    if (capability < choice.capability || (choice.hopper && !hopper)) continue;
    const int64_t tiles = ceil_div(M, choice.block_m) * ceil_div(N, choice.block_n);
    if (automatic && tiles < choice.min_tiles * multiprocessors) continue;
    const int64_t steps = ceil_div<int64_t>(K, kStepK) * parts;
    int64_t splits = choice.blocks * multiprocessors / (tiles > 0 ? tiles : 1);
    splits = splits < steps / choice.least_steps ? splits : steps / choice.least_steps;
    if (forced_splits > 0 && choice.blocks > 0) splits = forced_splits;
    if (splits < 1) splits = 1;
    const int64_t partials = splits > 1 ? tiles * splits * choice.block_m * choice.block_n : 0;
    return {choice.kernel, tiles, splits, partials};
  }
  return {PackedLinearKernel::kAuto, 0, 0, 0};  // before sm_80
}

template <class Input, int kBits, class Tile>
cudaError_t launch_packed_linear_tile(const PackedLinearArgs<Input>& args, int64_t tiles,
                                      cudaStream_t stream) {
  if (tiles * args.splits > 0x7fffffff) return cudaErrorInvalidValue;
  // A row's only group may end anywhere.
  const bool whole = args.group_size >= args.K || args.group_size % kStepK == 0;
  return launch(whole ? packed_linear<Input, kBits, Tile, kStepK>
                      : packed_linear<Input, kBits, Tile, static_cast<int>(kGroupMultiple)>,
                dim3(static_cast<unsigned>(tiles * args.splits)), dim3(Tile::kThreads),
                Tile::template kSharedBytes<Input, kBits>, stream, args);
}

template <int kBits, class Input>
cudaError_t launch_packed_linear(const PackedLinearArgs<Input>& args, const PackedLinearPlan& plan,
                                 int64_t multiprocessors, cudaStream_t stream) {
  if (args.M == 0 || args.N == 0) return cudaSuccess;
  switch (plan.kernel) {
    case PackedLinearKernel::kNarrow:
      return launch_packed_linear_tile<Input, kBits, PackedLinearNarrow>(args, plan.tiles, stream);
    case PackedLinearKernel::kWide:
      return launch_packed_linear_tile<Input, kBits, PackedLinearWide>(args, plan.tiles, stream);
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
