// winograd_conv2d of 16-bit tensors in one kernel, for up to 16 positions: V and M stay on the
// multiprocessor.
#pragma once

#include "winograd_conv2d_gemm.cuh"

namespace compressops {

// A block computes kTiles tiles of kBlockK output channels. The sum over channels goes by in steps
// of 16; V of a step is transformed while the tensor cores multiply that of the step before. A warp
// multiplies kPositions positions of all tiles and kWarpN output channels: 128 sums a lane, for 8
// warps a multiprocessor (64, for 12, where P = 6).
//
// kStagesU steps of U are in shared memory, the copies of the later ones under way.
template <int kAlphaH_, int kAlphaW_, int kStagesU_ = 4>
struct WinogradFusion {
  static constexpr int kAlphaH = kAlphaH_, kAlphaW = kAlphaW_, kP = kAlphaH * kAlphaW;
  static_assert(kP == 4 || kP == 6 || kP == 8 || kP == 16);
  static constexpr int kTiles = 64;
  static constexpr int kPositions = kP == 16 ? 2 : 1;
  static constexpr int kWarpN = kP == 16 || kP == 6 ? 32 : 64;
  static constexpr int kWarpsN = kP == 16 || kP == 8 ? 1 : 2;
  static constexpr int kBlockK = kWarpsN * kWarpN;
  static constexpr int kThreads = kP / kPositions * kWarpsN * kWarpSize;
  static constexpr int kStepC = 16, kWords = kStepC / 2;  // words of a row of a step
  static constexpr int kRowV = kP * kTiles, kRowU = kP * kBlockK;
  static constexpr int kChunksV = 2 * kRowV, kChunksU = 2 * kRowU;  // of 16 bytes, in a step
  static constexpr int kStagesV = 2, kStagesU = kStagesU_;
  // Words of V that a thread makes in a step.
  static constexpr int kItems = ceil_div(kTiles * kWords, kThreads);
  // M of half the tiles at a time, in the same memory. Rows are 8 banks apart, so that the four
  // rows that 16 lanes write at once lie side by side.
  static constexpr int kHalf = kTiles / 2, kRowM = kBlockK + 8;
  static constexpr int kBytesM = kP * kHalf * kRowM * 4;
  static constexpr int kBytesSteps = 16 * (kStagesV * kChunksV + kStagesU * kChunksU);
  static constexpr int kSharedBytes = kBytesSteps > kBytesM ? kBytesSteps : kBytesM;
  // A thread copies the same chunk of the same output channel of every kPositionStep-th position.
  static constexpr int kPositionStep = kThreads / 2 / kBlockK;
  static_assert(kThreads % 64 == 0 && kThreads % (2 * kBlockK) == 0 && kP % kPositionStep == 0);
  static_assert(kSharedBytes <= 163 * 1024);
};

// What a block may take on every GPU from sm_80 on: sm_86 and sm_89 have 99 KB, sm_80 163 KB.
constexpr int kLeastSharedBytes = 99 * 1024;

// Where chunk `chunk` of a row of 32 bytes lies. Four rows share a 128-byte line; the XOR makes the
// eight rows that one ldmatrix matrix reads fall in eight different bank groups.
__device__ __forceinline__ int fused_slot(int row, int chunk) {
  return row * 2 | (chunk ^ (row >> 2 & 1));
}

// What a block computes: tiles from first_tile on of the output channels from first_k on of a
// group.
template <class Fusion>
struct FusedBlock {
  int64_t group, first_k, first_tile;

  __device__ __forceinline__ FusedBlock(const WinogradShape& shape, int64_t index) {
    const int64_t blocks_k = ceil_div<int64_t>(shape.K, Fusion::kBlockK);
    const int64_t blocks_t = ceil_div<int64_t>(shape.tiles(), Fusion::kTiles);
    const int64_t column = index / blocks_k;
    group = column / blocks_t;
    first_k = (index - column * blocks_k) * Fusion::kBlockK;
    first_tile = (column - group * blocks_t) * Fusion::kTiles;
  }
};

template <class T, class Fusion>
__global__ void __launch_bounds__(Fusion::kThreads, 1) winograd_fused(WinogradArgs<T> args) {
  constexpr int kTiles = Fusion::kTiles, kItems = Fusion::kItems;
  constexpr int kAlphaH = Fusion::kAlphaH, kAlphaW = Fusion::kAlphaW;
  constexpr int kTilesM = kTiles / 16, kTilesN = Fusion::kWarpN / 8;
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, Fusion::kSharedBytes);
  const Shared<int4> shared_v = slice(shared, 0, Fusion::kStagesV * Fusion::kChunksV);
  const Shared<int4> shared_u =
      slice(shared, Fusion::kStagesV * Fusion::kChunksV, Fusion::kStagesU * Fusion::kChunksU);
  const WinogradShape& shape = args.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int first_position = warp / Fusion::kWarpsN * Fusion::kPositions;
  const int warp_n = warp % Fusion::kWarpsN * Fusion::kWarpN;

  const FusedBlock<Fusion> block(shape, block_index_x());
  const int steps = static_cast<int>(ceil_div<int64_t>(shape.C, Fusion::kStepC));

  // A thread makes the same word of V of every kThreads / 8-th tile. Where channels of x lie side
  // by side, 8 lanes read 32 bytes of a pixel; else 8 lanes read pixels of 8 tiles side by side.
  // Either way a warp writes 128 bytes of V in one go.
  const bool last = args.x_channels_last;
  const int tile = last ? thread / 8 : thread / 64 * 8 + lane % 8;
  const int word = last ? lane % 8 : warp % 2 * 4 + lane / 8;
  const int slot = 4 * fused_slot(tile, word / 4) + word % 4;
  const int channels = static_cast<int>(shape.C) - 2 * word;
  WinogradWindow windows[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    windows[item] = WinogradWindow(shape, args.x_strides,
                                   block.first_tile + tile + item * (Fusion::kThreads / 8));
    windows[item].corner += (block.group * shape.C + 2 * word) * args.x_strides.c;
  }
  const auto is_item = [&](int item) {
    return (item + 1) * Fusion::kThreads <= kTiles * Fusion::kWords ||
           item * Fusion::kThreads + thread < kTiles * Fusion::kWords;
  };
  uint32_t d[kItems][kAlphaH][kAlphaW];
  const auto load_x = [&](int step) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (!is_item(item)) break;
      const int c = step * Fusion::kStepC;
      winograd_load(args, windows[item], c * args.x_strides.c, channels - c, d[item]);
    }
  };
  const auto make_v = [&](int step) {
    const Shared<uint32_t> v = view_as<uint32_t>(
        slice(shared_v, step % Fusion::kStagesV * Fusion::kChunksV, Fusion::kChunksV));
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (!is_item(item)) break;
      winograd_transform_input<T>(d[item], [&](int i, const uint32_t (&row)[kAlphaW]) {
#pragma unroll
        for (int j = 0; j < kAlphaW; ++j) {
          v[slot + ((i * kAlphaW + j) * kTiles + item * (Fusion::kThreads / 8)) * Fusion::kWords] =
              row[j];
        }
      });
    }
  };
  const int64_t row_u = ceil_div<int64_t>(shape.C, 8) * 8;
  const int64_t position_u = shape.groups * shape.K * row_u;
  const int64_t k_u = block.first_k + thread / 2 % Fusion::kBlockK;
  const int64_t first_u = thread / 2 / Fusion::kBlockK * position_u +
                          (block.group * shape.K + k_u) * row_u + 8 * (thread % 2);
  const int slot_of_u = fused_slot(thread / 2, thread % 2);
  const int elements_u = k_u < shape.K ? static_cast<int>(row_u) - 8 * (thread % 2) : 0;
  const auto load_u = [&](int step) {
    const Shared<int4> stage =
        slice(shared_u, step % Fusion::kStagesU * Fusion::kChunksU, Fusion::kChunksU);
    const int c = step * Fusion::kStepC;
#pragma unroll
    for (int i = 0; i < Fusion::kP / Fusion::kPositionStep; ++i) {
      const int64_t source = first_u + i * (Fusion::kPositionStep * position_u) + c;
      cp_async_16(stage + (slot_of_u + i * Fusion::kThreads), view_as<const int4>(args.u + source),
                  c < elements_u);
    }
  };
  float sums[Fusion::kPositions][kTilesM][kTilesN][4] = {};
  const auto multiply = [&](int step) {
    const Shared<int4> v =
        slice(shared_v, step % Fusion::kStagesV * Fusion::kChunksV, Fusion::kChunksV);
    const Shared<int4> u =
        slice(shared_u, step % Fusion::kStagesU * Fusion::kChunksU, Fusion::kChunksU);
    // The XOR of a slot is the same in all rows of a lane, so they lie at constant distances.
    const int slot_v = fused_slot(first_position * kTiles + lane % 16, lane / 16);
    const int slot_u = fused_slot(
        first_position * Fusion::kBlockK + warp_n + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int p = 0; p < Fusion::kPositions; ++p) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        // Matrices: rows 0-7 and 8-15 of the first chunk, then of the second.
        ldmatrix_x4(a[i], v + (slot_v + 2 * (p * kTiles + 16 * i)));
      }
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        // Matrices: both chunks of rows 0-7, then of rows 8-15.
        uint32_t b[4];
        ldmatrix_x4(b, u + (slot_u + 2 * (p * Fusion::kBlockK + 8 * j)));
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          mma_m16n8k16<T>(sums[p][i][j], a[i], {b[0], b[1]});
          mma_m16n8k16<T>(sums[p][i][j + 1], a[i], {b[2], b[3]});
        }
      }
    }
  };

#pragma unroll
  for (int step = 0; step < Fusion::kStagesU - 1; ++step) {
    if (step < steps) load_u(step);
    cp_async_commit();  // also when empty: the waits below count groups
  }
  if (steps > 0) {
    load_x(0);
    make_v(0);
    load_x(1);  // zeros, where there is no such step
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Fusion::kStagesU - 2>();
    __syncthreads();  // everyone's U and V of this step are there, and those before are free
    load_u(step + Fusion::kStagesU - 1);
    cp_async_commit();
    // Half the warps of each scheduler begin with the tensor cores, the others with the transform.
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == warp / 4 % 2) {
        multiply(step);
      } else if (step + 1 < steps) {
        make_v(step + 1);
        load_x(step + 2);
      }
    }
  }
  cp_async_wait<0>();

  // Anew, so that it takes no registers up to here.
  const FusedBlock<Fusion> outputs(shape, block_index_x());
  const Shared<float> m = slice(view_as<float>(shared), 0, Fusion::kBytesM / 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();  // nobody reads what M overwrites
#pragma unroll
    for (int p = 0; p < Fusion::kPositions; ++p) {
#pragma unroll
      for (int i = 0; i < kTilesM / 2; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = (first_position + p) * Fusion::kHalf + 16 * i + 8 * e + lane / 4;
            const float (&quad)[4] = sums[p][half * kTilesM / 2 + i][j];
            int2 bits;
            bits.x = static_cast<int>(__float_as_uint(quad[2 * e]));
            bits.y = static_cast<int>(__float_as_uint(quad[2 * e + 1]));
            view_as<int2>(m)[(row * Fusion::kRowM + warp_n + 8 * j) / 2 + lane % 4] = bits;
          }
        }
      }
    }
    __syncthreads();  // M of these tiles is there
    constexpr int kPairs = Fusion::kBlockK / 2;
    for (int index = thread; index < Fusion::kHalf * kPairs; index += Fusion::kThreads) {
      const int tile = args.y_channels_last ? index / kPairs : index % Fusion::kHalf;
      const int pair = args.y_channels_last ? index % kPairs : index / Fusion::kHalf;
      const int64_t tile_index = outputs.first_tile + half * Fusion::kHalf + tile;
      if (tile_index >= shape.tiles() || outputs.first_k + 2 * pair >= shape.K) continue;
      const WinogradTile place(shape, tile_index);
      winograd_transform_output<2, kAlphaH, kAlphaW>(
          shape.tile_h, shape.tile_w,
          [&](int j, float (&values)[2][kAlphaH]) {
#pragma unroll
            for (int i = 0; i < kAlphaH; ++i) {
              const int row = (i * kAlphaW + j) * Fusion::kHalf + tile;
              const int2 bits = view_as<int2>(m)[row * Fusion::kRowM / 2 + pair];
              values[0][i] = __uint_as_float(static_cast<unsigned>(bits.x));
              values[1][i] = __uint_as_float(static_cast<unsigned>(bits.y));
            }
          },
          [&](int i, float (&y)[2][kMaxTile<kAlphaW>]) {
            winograd_store<T>(args, place.n, outputs.group, outputs.first_k + 2 * pair,
                              place.row + i, place.column, y);
          });
    }
  }
}

}  // namespace compressops
