// bsr_linear, its gradient of x, bsr_int8_linear and bsr_conv2d: y[M, N] = activation(x[M, K] @ W.T
// + bias) with W in block-sparse rows, or the stored matrix transposed; rows of x may be windows of
// images. One kernel, on mma.sync in 16 bits and in int8 (sm_80 and newer), and on fused
// multiply-adds in float32.
//
// A block computes kBlockM rows of 128 outputs: eight groups of 16, each of one row of blocks;
// which rows of blocks come together is for the caller to say, who may know which are alike. It
// walks over the columns that any of them stores: rows of x for a column are fetched once for all
// groups, and each group multiplies them by its own stored block, or not at all. So 16 × 16 blocks
// that fill a fraction d of the matrix read 1 − (1 − d)^8 of x a block, instead of 8 d: at 20 %
// 0.83 instead of 1.6, at 50 % 1.0 instead of 4. A column's chunk of 16 inputs in 16 bits is 4 KB
// of x of 128 rows and 512 bytes a stored cell of 16 × 16, for 32,768 multiply-adds each: with one
// cell of eight present 7 multiply-adds a byte, with all 32.
//
// No list of columns is made. Lane g of each warp has the cursor of group g; the least column under
// the cursors is next, the groups that have it take part, and their cursors move on. A row whose
// columns do not ascend, or come twice, is multiplied rightly, only in more steps.
//
// Few rows of x (kWarpsK > 1): warps take different chunks for all rows, and blocks different parts
// of the lists, so that all multiprocessors stream blocks.
#pragma once

#include "activation.cuh"
#include "bsr_operands.cuh"
#include "bsr_windows.cuh"
#include "device.cuh"
#include "float_type.cuh"
#include "ptx.cuh"
#include "split_sums.cuh"
#include "tiles.cuh"

namespace compressops {

constexpr int kBsrCell = 16;   // outputs of a group
constexpr int kBsrGroups = 8;  // of a block
constexpr int kBsrBlockN = kBsrCell * kBsrGroups;

template <class Input>
struct BsrArgs {
  int64_t M, N, K;
  Global<const Input> x;            // [M, K], rows on 16 bytes, x_row_stride elements apart
  int64_t x_row_stride, x_columns;  // whole pieces that can be read of a row
  BsrWindows windows;               // if rows are windows; x are images then
  Global<const Input> values;       // [nnz, r, c] on 16 bytes
  int64_t nnz, r, c;
  int64_t rows;                 // of blocks; of columns of blocks, if transposed
  Global<const int> starts;     // [rows + 1]
  Global<const int> columns;    // [nnz]: the blocks' columns; rows, if transposed
  Global<const int64_t> order;  // [nnz], if transposed: the blocks' numbers
  // In which order tiles take the rows of blocks: [rows], a permutation, or null: as they are.
  Global<const int> row_order;
  int64_t width;             // outputs that tiles cover: see bsr_width
  Global<const float> bias;  // [N] or null
  Activation activation;
  // Of int8: of rows of x; and of outputs.
  Global<const float> x_scales;
  Global<const int> x_zeros;  // or null
  Global<const float> scales;
  Global<const int> weight_sums;
  int64_t splits;
  Global<typename BsrOperands<Input>::Sum> partials;  // see plan_bsr; null for one split
  Global<unsigned> tickets;                           // zeros, one a tile; null for one split
  FloatType y_type;
  Global<uint8_t> y;  // [M, N]
};

// Without an order of the rows, tiles end with the outputs. With one the last row of blocks, which
// may have fewer, can stand anywhere.
template <class Input>
inline int64_t bsr_width(const BsrArgs<Input>& args) {
  return args.row_order == nullptr ? args.N : args.rows * args.r;
}

// The row of blocks that stands at `place`. A list that is no permutation leads nowhere: what is no
// row is passed over, rows that it has twice are written twice alike, and the others not at all.
template <class Input>
__device__ __forceinline__ int64_t bsr_row(const BsrArgs<Input>& args, int64_t place) {
  if (args.row_order == nullptr || place >= args.rows) return place;
  // A negative one is above all others as an unsigned number.
  return static_cast<unsigned>(load_nc<int>(args.row_order, place));
}

// kWarpsM warps have 16 kTilesM rows each; kWarpsK take different chunks of kSlots in a stage.
template <int kTilesM_, int kWarpsM_, int kWarpsK_, int kSlots_, int kStages_>
struct BsrTile {
  static constexpr int kTilesM = kTilesM_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr int kSlots = kSlots_, kStages = kStages_;
  static constexpr int kWarpM = 16 * kTilesM, kBlockM = kWarpM * kWarpsM;
  static constexpr int kThreads = kWarpsM * kWarpsK * kWarpSize;
  static constexpr int kSums = kBsrGroups * kTilesM * 8;
  static_assert(kSlots % kWarpsK == 0 && kSlots * kBsrGroups <= 32);

  template <class Input>
  static constexpr int kSlotX = kBlockM * BsrOperands<Input>::kPieces;
  template <class Input>
  static constexpr int kCell = kBsrCell * BsrOperands<Input>::kPieces;
  template <class Input>
  static constexpr int kStage = kSlots * (kSlotX<Input> + kBsrGroups * kCell<Input>);
  template <class Input>
  static constexpr int kSharedBytes = kStages * kStage<Input> * 16;
  static constexpr int kWindowBytes = kBlockM * 16;  // more, for windows
};

using BsrNarrow = BsrTile<1, 1, 4, 4, 4>;
using BsrMiddle = BsrTile<1, 4, 1, 2, 4>;
using BsrWide = BsrTile<2, 4, 1, 2, 4>;

// The next columns of a block's eight groups; the same in all warps. A lane's is that of group
// lane % 8, and it has fetched one column ahead.
template <bool kTransposed>
struct BsrCursor {
  static constexpr int kNone = 0x7fffffff;
  struct Entry {
    int column = kNone;
    int64_t block = 0;  // its number
  };
  int next = 0, end = 0;
  Entry here, ahead;
  int chunk = 0;  // of the column that all are at

  template <class Input>
  __device__ __forceinline__ void start(const BsrArgs<Input>& args, int64_t row, int64_t split) {
    if (row >= args.rows) return;
    // Indices that are none must not lead out of the arrays.
    const int64_t begin = max(load_nc<int>(args.starts, row), 0);
    const int64_t count =
        max(min(int64_t{load_nc<int>(args.starts, row + 1)}, args.nnz) - begin, int64_t{0});
    next = static_cast<int>(begin + count * split / args.splits);
    end = static_cast<int>(begin + count * (split + 1) / args.splits);
    here = fetch(args);
    ahead = fetch(args);
  }
  template <class Input>
  __device__ __forceinline__ Entry fetch(const BsrArgs<Input>& args) {
    if (next >= end) return {};
    const int at = next++;
    return {load_nc<int>(args.columns, at), kTransposed ? load_nc<int64_t>(args.order, at) : at};
  }
  template <class Input>
  __device__ __forceinline__ void advance(const BsrArgs<Input>& args) {
    here = ahead;
    ahead = fetch(args);
  }
  __device__ __forceinline__ int least() const {
    int least = here.column;
#pragma unroll
    for (int lanes = kBsrGroups / 2; lanes > 0; lanes /= 2) {
      least = min(least, __shfl_xor_sync(kFullWarp, least, lanes));
    }
    return least;
  }
};

template <class Input>
__device__ __forceinline__ float bsr_value(const BsrArgs<Input>& args, int64_t m, int64_t n,
                                           typename BsrOperands<Input>::Sum sum) {
  const float bias = args.bias == nullptr ? 0.0f : args.bias[n];
  if constexpr (sizeof(Input) == 1) {
    // Separate roundings of product and sum, so that every backend gives the same bits.
    if (args.x_zeros != nullptr) sum -= args.x_zeros[m] * args.weight_sums[n];
    const float scale = __fmul_rn(args.x_scales[m], args.scales[n]);
    return activate(__fadd_rn(__fmul_rn(__int2float_rn(sum), scale), bias), args.activation);
  } else {
    return activate(sum + bias, args.activation);
  }
}

template <class Input, bool kTransposed, bool kWindows, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) bsr_multiply(BsrArgs<Input> args) {
  using Operands = BsrOperands<Input>;
  using Sum = typename Operands::Sum;
  constexpr int kPieces = Operands::kPieces, kInputs = Operands::kInputs;
  constexpr int kPiece = 16 / static_cast<int>(sizeof(Input));  // elements
  constexpr int kSlots = Tile::kSlots, kStages = Tile::kStages, kTilesM = Tile::kTilesM;
  constexpr int kSlotX = Tile::template kSlotX<Input>, kCell = Tile::template kCell<Input>;
  constexpr int kStage = Tile::template kStage<Input>;
  constexpr int kBytes = Tile::template kSharedBytes<Input>;
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, kBytes + (kWindows ? Tile::kWindowBytes : 0));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp_m = thread / kWarpSize % Tile::kWarpsM;
  const int warp_k = thread / kWarpSize / Tile::kWarpsM;

  const int64_t tile = blockIdx.x / args.splits, split = blockIdx.x % args.splits;
  int64_t tile_m, tile_n;
  tile_of_block(tile, ceil_div<int64_t>(args.M, Tile::kBlockM),
                ceil_div<int64_t>(args.width, kBsrBlockN), &tile_m, &tile_n);
  // first_n and what is counted from it are places of outputs, in the order of the rows.
  const int64_t first_m = tile_m * Tile::kBlockM, first_n = tile_n * kBsrBlockN;
  const int64_t outputs = kTransposed ? args.c : args.r;  // of a block
  const int64_t inputs = kTransposed ? args.r : args.c;
  const int chunks = static_cast<int>(ceil_div<int64_t>(inputs, kInputs));

  BsrCursor<kTransposed> cursor;
  cursor.start(args, bsr_row(args, (first_n + lane % kBsrGroups * kBsrCell) / outputs), split);

  const Shared<int4> windows = slice(shared, kStages * kStage, kWindows ? Tile::kBlockM : 0);
  if constexpr (kWindows) {
    for (int row = thread; row < Tile::kBlockM; row += Tile::kThreads) {
      windows[row] = bsr_window(args.windows, first_m + row, args.M);
    }
    __syncthreads();  // the windows are there
  }

  // Of the groups whose pieces the thread copies, where in its block each begins.
  constexpr int kCopies = kBsrGroups * kCell / Tile::kThreads;
  int64_t insides[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    insides[i] = (first_n + (i * Tile::kThreads + thread) / kCell * kBsrCell) % outputs;
  }
  // first_k is the first input of a chunk, `within` its block.
  const auto load_cell_piece = [&](Shared<int4> target, int64_t block, int64_t inside, int row,
                                   int piece, int64_t first_k, int within) {
    if constexpr (kTransposed) {
      // The cell's rows are inputs.
      const int64_t input = within + row;
      const bool valid = first_k >= 0 && input < inputs && first_k + row < args.K;
      const int64_t source = (block * args.r + input) * args.c + inside + piece * kPiece;
      cp_async_16(target, view_as<const int4>(args.values + (valid ? source : 0)), valid);
    } else {
      const int64_t k = first_k + piece * kPiece, input = within + piece * kPiece;
      const bool valid = first_k >= 0 && input < inputs && k < args.K;
      const int64_t source = (block * args.r + inside + row) * args.c + input;
      // What the block holds beyond K would meet zeros of x, which keep a NaN.
      if (valid && k + kPiece > args.K) {
        target[0] = load_some<Input>(args.values + source, args.K - k);
      } else {
        cp_async_16(target, view_as<const int4>(args.values + (valid ? source : 0)), valid);
      }
    }
  };

  // Starts the copies of a stage's slots; which groups take part in each: eight bits a slot.
  const auto load_stage = [&](int stage) {
    const Shared<int4> to = slice(shared, stage * kStage, kStage);
    uint32_t present = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int least = cursor.least();
      if (least == cursor.kNone) break;
      const bool mine = cursor.here.column == least;
      const unsigned groups = __ballot_sync(kFullWarp, mine) & 0xffu;
      present |= groups << kBsrGroups * slot;
      const int64_t first_k = least * inputs + cursor.chunk * kInputs;
      const Shared<int4> x = slice(to, slot * kSlotX, kSlotX);
      // A thread copies one piece of several rows.
      static_assert(Tile::kThreads % kPieces == 0);
      const int piece = thread % kPieces;
      const int64_t k = first_k + piece * kPiece;
      const bool there =
          k >= 0 && k < args.x_columns && cursor.chunk * kInputs + piece * kPiece < inputs;
      BsrTap tap;
      if constexpr (kWindows) tap = bsr_tap(args.windows, there ? static_cast<int>(k) : 0);
#pragma unroll
      for (int i = 0; i < ceil_div(kSlotX, Tile::kThreads); ++i) {
        const int index = i * Tile::kThreads + thread;
        if (kSlotX % Tile::kThreads != 0 && index >= kSlotX) continue;
        const int row = index / kPieces;
        int64_t source;
        if constexpr (kWindows) {
          source = bsr_element(args.windows, windows[row], tap);
        } else {
          source = first_m + row < args.M ? (first_m + row) * args.x_row_stride + k : -1;
        }
        const bool valid = there && source >= 0;
        cp_async_16(x + bsr_place<kPieces>(row, piece),
                    view_as<const int4>(args.x + (valid ? source : 0)), valid);
      }
      // A warp copies pieces of one cell at a time.
      const Shared<int4> cells =
          slice(to, kSlots * kSlotX + slot * kBsrGroups * kCell, kBsrGroups * kCell);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int index = i * Tile::kThreads + thread;
        const int group = index / kCell, row = index % kCell / kPieces, piece = index % kPieces;
        const int64_t of_group = __shfl_sync(kFullWarp, cursor.here.block, group);
        if ((groups >> group & 1) == 0) continue;
        load_cell_piece(cells + (group * kCell + bsr_place<kPieces>(row, piece)), of_group,
                        insides[i], row, piece, first_k, cursor.chunk * kInputs);
      }
      if (++cursor.chunk == chunks) {
        cursor.chunk = 0;
        if (mine) cursor.advance(args);
      }
    }
    return present;
  };
  static_assert(kCell % kWarpSize == 0 && kBsrGroups * kCell % Tile::kThreads == 0);

  uint32_t ahead[kStages - 1] = {};
  const auto load_next = [&](int stage) {
#pragma unroll
    for (int i = 0; i + 1 < kStages - 1; ++i) ahead[i] = ahead[i + 1];
    ahead[kStages - 2] = load_stage(stage);
    cp_async_commit();  // also when empty: the waits below count groups
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);
  Sum sums[kBsrGroups][kTilesM][2][4] = {};
  for (int step = 0;; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // everyone's copies of this step are there, and the stage before is free
    const uint32_t present = ahead[0];
    if (present == 0) break;
    load_next((step + kStages - 1) % kStages);

    const Shared<int4> stage = slice(shared, step % kStages * kStage, kStage);
#pragma unroll
    for (int i = 0; i < kSlots / Tile::kWarpsK; ++i) {
      const int slot = i * Tile::kWarpsK + warp_k;
      const uint32_t groups = present >> kBsrGroups * slot & 0xffu;
      if (groups == 0) continue;
      typename Operands::template Rows<kTilesM> rows;
      Operands::template load<kTilesM>(slice(stage, slot * kSlotX, kSlotX), warp_m * Tile::kWarpM,
                                       lane, rows);
#pragma unroll
      for (int group = 0; group < kBsrGroups; ++group) {
        if ((groups >> group & 1) == 0) continue;
        const int cell = kSlots * kSlotX + (slot * kBsrGroups + group) * kCell;
        Operands::template multiply<kTilesM, kTransposed>(sums[group], rows,
                                                          slice(stage, cell, kCell), lane);
      }
    }
  }
  cp_async_wait<0>();

  Sum flat[Tile::kSums];
#pragma unroll
  for (int e = 0; e < Tile::kSums; ++e) {
    flat[e] = sums[e / (kTilesM * 8)][e / 8 % kTilesM][e / 4 % 2][e % 4];
  }
  const int holder = warp_m * kWarpSize + lane;
  if constexpr (Tile::kWarpsK > 1) {
    // The first warps add the others' sums, in their order. The last step's barrier freed the
    // stages.
    constexpr int kColumns = Tile::kWarpsM * kWarpSize;
    static_assert((Tile::kWarpsK - 1) * Tile::kSums * kColumns * 4 <= kBytes);
    const Shared<Sum> others = view_as<Sum>(shared);
#pragma unroll
    for (int e = 0; e < Tile::kSums; ++e) {
      if (warp_k > 0) others[((warp_k - 1) * Tile::kSums + e) * kColumns + holder] = flat[e];
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < Tile::kSums; ++e) {
      if (warp_k > 0) continue;
#pragma unroll
      for (int other = 0; other < Tile::kWarpsK - 1; ++other) {
        flat[e] += others[(other * Tile::kSums + e) * kColumns + holder];
      }
    }
  }
  if (args.splits > 1 && !add_splits(flat, args.partials, args.tickets, tile, split, args.splits,
                                     warp_k > 0 ? -1 : holder, Tile::kWarpsM * kWarpSize)) {
    return;
  }
  // By way of shared memory, so that a warp writes 32 outputs in succession, and what follows the
  // sums stands in the code once.
  static_assert(Tile::kBlockM * kBsrBlockN * 4 <= kBytes);
  const Shared<Sum> results = view_as<Sum>(shared);
  // Eight rows of four pairs, which a warp has, lie in 32 banks.
  const auto place = [](int row, int n) {
    return row * kBsrBlockN + (n ^ (row % 4 * 8 | row / 4 % 2));
  };
  __syncthreads();  // what was shared before is read
#pragma unroll
  for (int e = 0; e < Tile::kSums; ++e) {
    const int group = e / (kTilesM * 8), i = e / 8 % kTilesM, half = e / 4 % 2, of_row = e % 4 / 2;
    const int row = warp_m * Tile::kWarpM + 16 * i + 8 * of_row + lane / 4;
    const int n = group * kBsrCell + 8 * half + 2 * (lane % 4) + e % 2;
    if (warp_k == 0) results[place(row, n)] = flat[e];
  }
  __syncthreads();
  // A thread writes one output of every row.
  static_assert(Tile::kThreads == kBsrBlockN);
  const int64_t n =
      bsr_row(args, (first_n + thread) / outputs) * outputs + (first_n + thread) % outputs;
  for (int row = 0; row < Tile::kBlockM; ++row) {
    const int64_t m = first_m + row;
    if (m >= args.M || n >= args.N) break;
    store_float(args.y, args.y_type, m * args.N + n,
                bsr_value(args, m, n, static_cast<Sum>(results[place(row, thread)])));
  }
}

}  // namespace compressops
