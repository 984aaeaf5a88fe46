// Which tile of bsr_linear.cuh serves a shape, its scratch, and its launch.
#pragma once

#include "bsr_linear.cuh"

namespace compressops {

// The tests force each.
enum class BsrKernel : int { kAuto = -1, kNarrow, kMiddle, kWide };

struct BsrChoice {
  int64_t max_m;  // serves M up to this
  BsrKernel kernel;
  int64_t block_m;
  int64_t blocks;       // of a multiprocessor, that blocks of the weight are split for
  int64_t least_steps;  // of 16 inputs (32 of int8) that a split has on average
};

// The first row that fits; from counting bytes, not yet from measurements.
constexpr BsrChoice kBsrChoices[] = {
    {16, BsrKernel::kNarrow, BsrNarrow::kBlockM, 2, 16},
    {64, BsrKernel::kMiddle, BsrMiddle::kBlockM, 2, 16},
    {INT64_MAX, BsrKernel::kWide, BsrWide::kBlockM, 1, 16},
};

struct BsrPlan {
  BsrKernel kernel;
  int64_t tiles, splits;
  int64_t partials;  // sums of scratch
};

// N: outputs that tiles cover; cells: of 16 outputs × 16 inputs (32 of int8) that the weight
// stores.
inline BsrPlan plan_bsr(int64_t M, int64_t N, int64_t cells, int64_t multiprocessors,
                        BsrKernel forced = BsrKernel::kAuto, int64_t forced_splits = 0) {
  for (const BsrChoice& choice : kBsrChoices) {
    const bool fits = forced == BsrKernel::kAuto ? M <= choice.max_m : forced == choice.kernel;
    if (!fits) continue;
    const int64_t tiles = ceil_div(M, choice.block_m) * ceil_div<int64_t>(N, kBsrBlockN);
    const int64_t steps = cells / max(ceil_div<int64_t>(N, kBsrCell), int64_t{1});
    int64_t splits = choice.blocks * multiprocessors / max(tiles, int64_t{1});
    splits = forced_splits > 0 ? forced_splits : min(splits, steps / choice.least_steps);
    splits = max(splits, int64_t{1});
    return {choice.kernel, tiles, splits,
            splits > 1 ? tiles * splits * choice.block_m * kBsrBlockN : 0};
  }
  return {BsrKernel::kAuto, 0, 0, 0};
}

// Blocks that the kernel can cut into cells; `transposed`: outputs are the blocks' columns.
inline bool bsr_fits(int64_t r, int64_t c, int64_t element_bytes, bool transposed) {
  const int64_t outputs = transposed ? c : r, inputs = transposed ? r : c;
  return outputs % kBsrCell == 0 && inputs * element_bytes % 16 == 0;
}

template <class Tile, bool kTransposed, bool kWindows, class Input>
cudaError_t launch_bsr_tile(const BsrArgs<Input>& args, int64_t tiles, cudaStream_t stream) {
  if (tiles * args.splits > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(bsr_multiply<Input, kTransposed, kWindows, Tile>,
                dim3(static_cast<unsigned>(tiles * args.splits)), dim3(Tile::kThreads),
                Tile::template kSharedBytes<Input> + (kWindows ? Tile::kWindowBytes : 0), stream,
                args);
}

template <bool kTransposed, bool kWindows, class Input>
cudaError_t launch_bsr(const BsrArgs<Input>& args, const BsrPlan& plan, cudaStream_t stream) {
  if (args.M == 0 || args.N == 0) return cudaSuccess;
  switch (plan.kernel) {
    case BsrKernel::kNarrow:
      return launch_bsr_tile<BsrNarrow, kTransposed, kWindows>(args, plan.tiles, stream);
    case BsrKernel::kMiddle:
      return launch_bsr_tile<BsrMiddle, kTransposed, kWindows>(args, plan.tiles, stream);
    case BsrKernel::kWide:
      return launch_bsr_tile<BsrWide, kTransposed, kWindows>(args, plan.tiles, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace compressops
