// int8_linear: y[M, N] = activation((q[M, K] @ weight[N, K].T − x_zero[M] · weight_sum[N]) ·
// x_scale[M] · weight_scale[N] + bias)
//
// Kernel 1 quantizes each row of x to int8. Kernel 2 is one of
//   rows   M ≤ 16: the weight's N·K bytes are all the traffic that counts, so each is read once, by
//          the warp that owns its row, and multiplied with dp4a;
//   tile   an int8 GEMM on the tensor cores, see int8_tile.cuh;
//   wgmma  the same for Hopper and large M, see int8_linear_wgmma.cuh.
// Sums are exact in int32; the caller refuses a K that is too large for that.
#pragma once

#include "activation.cuh"
#include "device.cuh"
#include "int8_tile.cuh"
#include "ptx.cuh"
#include "quantize_rows.cuh"
#include "tiles.cuh"

namespace compressops {

template <class T>
struct Int8LinearArgs {
  int64_t M, N, K;
  Global<const T> x;  // [M, K], rows x_row_stride elements apart
  int64_t x_row_stride;
  Global<const int8_t> weight;        // [N, K]
  Global<const float> weight_scales;  // [N]
  Global<const int> weight_sums;      // [N], read where there are zero points
  Global<const float> bias;           // [N] or null
  Activation activation;
  Global<int8_t> q;        // scratch [M, padded_to_16(K)]
  Global<float> x_scales;  // scratch [M]
  RowScaling scaling;
  RowZeros x_zeros;  // zeros: scratch [M], or null if symmetric
  Global<T> y;       // [M, N]
};

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, lanes);
  }
  return value;
}

// 16 weights of a row from column k on, zeros past K. kAligned: rows start on 16 bytes, K % 16 = 0.
template <bool kAligned>
__device__ __forceinline__ int4 load_16_weights(Global<const int8_t> row, int64_t k, int64_t K) {
  if constexpr (kAligned) {
    return load_nc<int4>(view_as<const int4>(row + k), 0);
  } else {
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (k + i < K) {
        const auto byte = static_cast<uint8_t>(load_nc<int8_t>(row, k + i));
        words[i / 4] |= static_cast<unsigned>(byte) << (8 * (i % 4));
      }
    }
    return make_int4(static_cast<int>(words[0]), static_cast<int>(words[1]),
                     static_cast<int>(words[2]), static_cast<int>(words[3]));
  }
}

// Separate roundings of product and sum, so that every backend gives the same bits. Nobody writes
// what is read here during the launch; said so, it is read once for all the sums of a column.
template <class T>
__device__ __forceinline__ float int8_linear_value(const Int8LinearArgs<T>& args, int64_t m,
                                                   int64_t n, int sum) {
  const float scale = __fmul_rn(load_nc<float>(args.x_scales, m),  //
                                load_nc<float>(args.weight_scales, n));
  const float bias = args.bias == nullptr ? 0.0f : load_nc<float>(args.bias, n);
  if (args.x_zeros.zeros != nullptr) {
    sum -= load_nc<int>(args.x_zeros.zeros, m) * load_nc<int>(args.weight_sums, n);
  }
  const float value = __fadd_rn(__fmul_rn(__int2float_rn(sum), scale), bias);
  return activate(value, args.activation);
}

template <class T>
__device__ __forceinline__ void int8_linear_store(const Int8LinearArgs<T>& args, int64_t m,
                                                  int64_t n, int sum) {
  args.y[m * args.N + n] = from_float<T>(int8_linear_value(args, m, n, sum));
}

// A warp owns two rows of the weight: q is read half as often as with one, and with M ≤ 16 the 32
// sums of a lane still fit its registers.
constexpr int kRowsWarps = 4;
constexpr int kRowsColumns = 2;

template <class T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kRowsWarps* kWarpSize) int8_linear_rows(Int8LinearArgs<T> args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t first_n = (int64_t{blockIdx.x} * kRowsWarps + warp) * kRowsColumns;
  const int64_t padded_k = padded_to_16(args.K);

  int sums[kRows][kRowsColumns] = {};
  for (int64_t k = int64_t{16} * lane; k < args.K; k += 16 * kWarpSize) {
    int4 weights[kRowsColumns];
#pragma unroll
    for (int column = 0; column < kRowsColumns; ++column) {
      weights[column] = make_int4(0, 0, 0, 0);
      if (first_n + column < args.N) {
        weights[column] =
            load_16_weights<kAligned>(args.weight + (first_n + column) * args.K, k, args.K);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row < args.M) {
        const int4 left = load_nc<int4>(
            view_as<const int4>(Global<const int8_t>(args.q) + (row * padded_k + k)), 0);
#pragma unroll
        for (int column = 0; column < kRowsColumns; ++column) {
          int& sum = sums[row][column];
          sum = __dp4a(left.x, weights[column].x, sum);
          sum = __dp4a(left.y, weights[column].y, sum);
          sum = __dp4a(left.z, weights[column].z, sum);
          sum = __dp4a(left.w, weights[column].w, sum);
        }
      }
    }
  }
  // Another lane for each, so that their epilogues run side by side.
  static_assert(kRows * kRowsColumns <= kWarpSize);
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kRows * kRowsColumns; ++i) {
    const int sum = warp_sum(sums[i / kRowsColumns][i % kRowsColumns]);
    mine = lane == i ? sum : mine;
  }
  const int row = lane / kRowsColumns;
  const int64_t n = first_n + lane % kRowsColumns;
  if (lane < kRows * kRowsColumns && row < args.M && n < args.N) {
    int8_linear_store(args, row, n, mine);
  }
}

template <class Tile, bool kAligned, class T>
__device__ __forceinline__ void int8_linear_load_stage(const Int8LinearArgs<T>& args,
                                                       Shared<int4> stage_q,
                                                       Shared<int4> stage_weight, int64_t first_m,
                                                       int64_t first_n, int64_t first_k) {
  const int64_t padded_k = padded_to_16(args.K);
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % Tile::kChunks;
  const int64_t k = first_k + 16 * chunk;
#pragma unroll
  for (int i = 0; i < Tile::kCopiesLeft; ++i) {
    const int row = i * Tile::kCopyRows + thread / Tile::kChunks;
    const int64_t m = first_m + row;
    const bool valid = m < args.M && k < padded_k;
    const int64_t source = valid ? m * padded_k + k : 0;
    cp_async_16(stage_q + swizzled(row, chunk),
                view_as<const int4>(Global<const int8_t>(args.q) + source), valid);
  }
#pragma unroll
  for (int i = 0; i < Tile::kCopiesRight; ++i) {
    const int row = i * Tile::kCopyRows + thread / Tile::kChunks;
    const int64_t n = first_n + row;
    const bool valid = n < args.N && k < args.K;
    const int64_t source = valid ? n * args.K : 0;
    if constexpr (kAligned) {
      cp_async_16(stage_weight + swizzled(row, chunk),
                  view_as<const int4>(args.weight + (source + (valid ? k : 0))), valid);
    } else {
      stage_weight[swizzled(row, chunk)] =
          valid ? load_16_weights<false>(args.weight + source, k, args.K) : make_int4(0, 0, 0, 0);
    }
  }
}

struct Int8LinearRow {
  int64_t m;
  bool valid;
};

template <class T, class Tile, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads) int8_linear_tile(Int8LinearArgs<T> args) {
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, Tile::kSharedBytes);
  int64_t tile_m, tile_n;
  tile_of_block(blockIdx.x, ceil_div<int64_t>(args.M, Tile::kBlockM),
                ceil_div<int64_t>(args.N, Tile::kBlockN), &tile_m, &tile_n);
  const int64_t first_m = tile_m * Tile::kBlockM, first_n = tile_n * Tile::kBlockN;

  Tile tile;
  multiply_tile(tile, shared, static_cast<int>(ceil_div<int64_t>(args.K, Tile::kStepK)),
                [&](int step, Shared<int4> stage_q, Shared<int4> stage_weight) {
                  int8_linear_load_stage<Tile, kAligned>(args, stage_q, stage_weight, first_m,
                                                         first_n, int64_t{step} * Tile::kStepK);
                });
  store_tile(
      tile, [&](int row) { return Int8LinearRow{first_m + row, first_m + row < args.M}; },
      [&](const Int8LinearRow& row, int column, int sum) {
        if (first_n + column < args.N) int8_linear_store(args, row.m, first_n + column, sum);
      });
}

}  // namespace compressops
