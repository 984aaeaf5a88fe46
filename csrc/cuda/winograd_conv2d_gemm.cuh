// The products of winograd_conv2d: M[b] = V[b] @ U[b].T for every position and group b, or its
// transpose.
#pragma once

#include "warp.cuh"
#include "winograd_conv2d_chunk.cuh"

namespace compressops {

// A block computes kBlockM × kBlockN of one M[b], a warp kWarpM × kWarpN of it. The sum over
// channels goes by in steps of 64 bytes, kStages of them in shared memory, the copies of the later
// ones under way.
template <int kBlockM_, int kBlockN_, int kWarpM_, int kWarpN_, int kStages_>
struct WinogradTiling {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr int kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = kBlockM / kWarpM * kWarpsN * kWarpSize;
  static constexpr int kChunks = 4;  // 16-byte chunks in a row of a stage
  static constexpr int kStageLeft = kBlockM * kChunks, kStageRight = kBlockN * kChunks;
  static constexpr int kSharedBytes = kStages * (kStageLeft + kStageRight) * 16;
  static_assert(kStageLeft % kThreads == 0 && kStageRight % kThreads == 0);
};

// U with its rows of C filled up with zeros to `words` words, for kernels that read 16 bytes at a
// time. Only where C is no multiple of that, or u begins elsewhere.
template <class T>
__global__ void __launch_bounds__(kWinogradThreads)
    winograd_pad_u(Global<const T> u, int64_t rows, int64_t C, int64_t words,
                   Global<uint32_t> out) {
  const WinogradPlace place(rows, words);
  if (place.line >= rows || place.word >= words) return;
  float values[kPerWord<T>];
#pragma unroll
  for (int s = 0; s < kPerWord<T>; ++s) {
    const int64_t c = place.word * kPerWord<T> + s;
    values[s] = c < C ? to_float(load_nc<T>(u, place.line * C + c)) : 0.0f;
  }
  out[place.line * words + place.word] = pack_word<T>(values);
}

// Where chunk `chunk` of a row lies in a stage. Two rows share a 128-byte line; the XOR spreads
// over its eight bank groups the rows that a warp reads together: eight in succession
// (kRowShift = 1), or pairs 8 apart (kRowShift = 3).
template <int kRowShift>
__device__ __forceinline__ int stage_slot(int row, int chunk) {
  return row * 4 + (chunk ^ (row >> kRowShift & 3));
}

// Copies rows of V or U into stages, one step of 64 bytes after the other. A thread has one chunk
// of every kThreads / 4-th row.
template <class T, int kRows, int kThreads, int kRowShift>
struct WinogradLoader {
  static constexpr int kLoads = kRows * 4 / kThreads, kElements = 16 / sizeof(T);
  Global<const T> row;
  int64_t row_step;
  unsigned rows;  // which of the thread's there are

  __device__ __forceinline__ WinogradLoader(Global<const T> data, int64_t first_row, int64_t count,
                                            int64_t row_stride) {
    const int64_t first = first_row + static_cast<int>(threadIdx.x) / 4;
    row = data + first * row_stride;
    row_step = kThreads / 4 * row_stride;
    rows = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      rows |= static_cast<unsigned>(first + i * (kThreads / 4) < count) << i;
    }
  }

  // Elements from `at` on, of which the row has some.
  __device__ __forceinline__ void load(Shared<int4> stage, int64_t at, bool valid) const {
    static_assert(kThreads % 32 == 0 && (kThreads / 4 >> kRowShift) % 4 == 0);
    const int thread = static_cast<int>(threadIdx.x);
    const int slot = stage_slot<kRowShift>(thread / 4, thread % 4);  // the same XOR in all rows
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      cp_async_16(stage + (slot + i * kThreads), view_as<const int4>(row + (i * row_step + at)),
                  valid && (rows >> i & 1) != 0);
    }
  }
};

// The sums of a warp, of 16-bit elements by mma.sync. Column n of the j-th of four MMAs side by
// side is column 8 (n / 2) + 2 j + n % 2 of their 32, so that a lane ends up with 8 columns in
// succession, 16 bytes of M.
template <class T, class Tiling>
struct WinogradSums {
  static constexpr int kRightShift = 3;
  static constexpr int kTilesM = Tiling::kWarpM / 16, kTilesN = Tiling::kWarpN / 8;
  static_assert(Tiling::kWarpM % 16 == 0 && Tiling::kWarpN % 32 == 0);
  float sums[kTilesM][kTilesN][4] = {};

  __device__ __forceinline__ void fold() {}  // the roundings to 16 bits count for more

  __device__ __forceinline__ void multiply(Shared<int4> left, Shared<int4> right, int warp_m,
                                           int warp_n, int lane) {
    const int n = lane % 8;
#pragma unroll
    for (int chunk = 0; chunk < Tiling::kChunks; chunk += 2) {
      // The XOR of a slot is the same in all rows of a lane, so they lie at constant distances.
      const int slot_a = stage_slot<1>(warp_m + lane % 16, chunk + lane / 16);
      const int slot_b = stage_slot<kRightShift>(warp_n + 8 * (n / 2) + 2 * (lane / 16) + n % 2,
                                                 chunk + lane / 8 % 2);
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        // Matrices: rows 0-7 and 8-15 of the first chunk, then of the second.
        ldmatrix_x4(a[i], left + (slot_a + 16 * i * Tiling::kChunks));
      }
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        // Matrices: both chunks of MMA j, then of j + 1.
        uint32_t b[4];
        ldmatrix_x4(b, right + (slot_b + (j / 4 * 32 + 2 * (j % 4)) * Tiling::kChunks));
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          mma_m16n8k16<T>(sums[i][j], a[i], {b[0], b[1]});
          mma_m16n8k16<T>(sums[i][j + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }

  // Rows from first_m on and columns from first_n on of a matrix of M, scaled (WinogradProduct).
  __device__ __forceinline__ void store(const WinogradChunk& chunk, Global<__half> m,
                                        Global<float> scales, int64_t first_m, int64_t first_n,
                                        int lane) {
    // As bits, magnitudes order like integers. Of the finite sums alone: Inf and NaN stay what they
    // are under any scale, and must not take the others' from them.
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const unsigned bits = __float_as_uint(sums[i][j][e]) & 0x7fffffffu;
          if (bits < 0x7f800000u) top = max(top, bits);
        }
      }
    }
    top = warp_max(top);
    // Exponents as float32 has them; sums below 2^-112 are scaled as if they were that.
    const unsigned exponent = max(top >> 23, 15u);
    const float scale = __uint_as_float((268u - exponent) << 23);
    const bool in_matrix = first_m < chunk.rows && first_n < chunk.columns;
    if (lane == 0 && in_matrix) {
      const int64_t at = (first_m >> chunk.row_log2) * chunk.scale_columns;
      scales[at + (first_n >> chunk.column_log2)] = __uint_as_float((exponent - 14u) << 23);
    }
    const Global<int4> lines = view_as<int4>(m);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_m + 16 * i + 8 * half + lane / 4;
#pragma unroll
        for (int j = 0; j < kTilesN; j += 4) {
          const int64_t column = first_n + 8 * j + 8 * (lane % 4);
          const auto word = [&](int mma) {
            const float (&pair)[4] = sums[i][j + mma];
            return static_cast<int>(
                pack_word<__half>({pair[2 * half] * scale, pair[2 * half + 1] * scale}));
          };
          if (row < chunk.rows && column < 2 * chunk.m_words) {
            lines[(row * chunk.m_words * 2 + column) / 8] =
                make_int4(word(0), word(1), word(2), word(3));
          }
        }
      }
    }
  }
};

__device__ __forceinline__ float dot(const float (&a)[4], const float (&b)[4], float sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += a[i] * b[i];
  return sum;
}

// The same in float32: a lane has rows lane / 8 + 4 i and columns lane % 8 + 8 j, and of 32 × 64 it
// reads 16 chunks for 256 multiply-adds.
template <class Tiling>
struct WinogradSums<float, Tiling> {
  static constexpr int kRightShift = 1;
  static constexpr int kRows = Tiling::kWarpM / 4, kColumns = Tiling::kWarpN / 8;
  static_assert(Tiling::kWarpM % 8 == 0 && Tiling::kWarpN % 8 == 0);
  float sums[kRows][kColumns] = {}, folded[kRows][kColumns] = {};

  // Sums of 64 channels are added up apart: a third of the roundings' error at 512 channels.
  __device__ __forceinline__ void fold() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        folded[i][j] += sums[i][j];
        sums[i][j] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void multiply(Shared<int4> left, Shared<int4> right, int warp_m,
                                           int warp_n, int lane) {
#pragma unroll
    for (int chunk = 0; chunk < Tiling::kChunks; ++chunk) {
      // The XOR of a slot is the same in rows 8 apart, and differs by 2 in those between.
      const int slot_a = stage_slot<1>(warp_m + lane / 8, chunk);
      const int slot_b = stage_slot<kRightShift>(warp_n + lane % 8, chunk);
      float a[kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        as_floats(left[(slot_a ^ 2 * (i % 2)) + 4 * i * Tiling::kChunks], a[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float b[4];
        as_floats(right[slot_b + 8 * j * Tiling::kChunks], b);
#pragma unroll
        for (int i = 0; i < kRows; ++i) sums[i][j] = dot(a[i], b, sums[i][j]);
      }
    }
  }

  __device__ __forceinline__ void store(const WinogradChunk& chunk, Global<float> m, Global<float>,
                                        int64_t first_m, int64_t first_n, int lane) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first_m + lane / 8 + 4 * i;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int64_t column = first_n + lane % 8 + 8 * j;
        if (row < chunk.rows && column < chunk.columns) {
          m[row * chunk.m_words + column] = folded[i][j] + sums[i][j];
        }
      }
    }
  }
};

template <class T, class Tiling>
__global__ void __launch_bounds__(Tiling::kThreads)
    winograd_multiply(WinogradArgs<T> args, WinogradChunk chunk, Global<const T> v,
                      Global<WinogradProduct<T>> m, Global<float> scales) {
  using Sums = WinogradSums<T, Tiling>;
  constexpr int kElements = Tiling::kChunks * 16 / sizeof(T);  // of a row of a stage
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, Tiling::kSharedBytes);
  const Shared<int4> shared_left = slice(shared, 0, Tiling::kStages * Tiling::kStageLeft);
  const Shared<int4> shared_right =
      slice(shared, Tiling::kStages * Tiling::kStageLeft, Tiling::kStages * Tiling::kStageRight);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int warp_m = warp / Tiling::kWarpsN * Tiling::kWarpM;
  const int warp_n = warp % Tiling::kWarpsN * Tiling::kWarpN;

  const int64_t tiles_n = ceil_div<int64_t>(chunk.columns, Tiling::kBlockN);
  const int64_t tiles_m = ceil_div<int64_t>(chunk.rows, Tiling::kBlockM);
  const int64_t tile = int64_t{blockIdx.x} / tiles_n;
  const int64_t first_n = (int64_t{blockIdx.x} - tile * tiles_n) * Tiling::kBlockN;
  const int64_t b = tile / tiles_m;
  const int64_t first_m = (tile - b * tiles_m) * Tiling::kBlockM;

  const WinogradShape& shape = args.shape;
  const int64_t group = b / shape.positions(), position = b - group * shape.positions();
  const int64_t first_u = position * shape.groups + chunk.first_group + group;
  const int64_t row = chunk.v_words * kPerWord<T>;
  const Global<const T> of_v = v + b * chunk.tiles * row;
  const Global<const T> of_u = args.u + first_u * shape.K * row;
  const WinogradLoader<T, Tiling::kBlockM, Tiling::kThreads, 1> left(
      args.y_channels_last ? of_v : of_u, first_m, chunk.rows, row);
  const WinogradLoader<T, Tiling::kBlockN, Tiling::kThreads, Sums::kRightShift> right(
      args.y_channels_last ? of_u : of_v, first_n, chunk.columns, row);
  const int steps = static_cast<int>(ceil_div<int64_t>(shape.C, kElements));

  const auto load_step = [&](int step) {
    const int stage = step % Tiling::kStages;
    const int64_t at = int64_t{step} * kElements + 16 / sizeof(T) * (threadIdx.x % 4);
    left.load(slice(shared_left, stage * Tiling::kStageLeft, Tiling::kStageLeft), at, at < row);
    right.load(slice(shared_right, stage * Tiling::kStageRight, Tiling::kStageRight), at, at < row);
  };
#pragma unroll
  for (int step = 0; step < Tiling::kStages - 1; ++step) {
    if (step < steps) load_step(step);
    cp_async_commit();  // also when empty: the waits below count groups
  }
  Sums sums;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tiling::kStages - 2>();
    __syncthreads();  // everyone's copies of this step are there, and the stage before is free
    if (step + Tiling::kStages - 1 < steps) load_step(step + Tiling::kStages - 1);
    cp_async_commit();
    const int stage = step % Tiling::kStages;
    sums.multiply(slice(shared_left, stage * Tiling::kStageLeft, Tiling::kStageLeft),
                  slice(shared_right, stage * Tiling::kStageRight, Tiling::kStageRight), warp_m,
                  warp_n, lane);
    if (step % 4 == 3) sums.fold();
  }
  sums.store(chunk, m + b * chunk.rows * chunk.m_words * kPerWord<T>,
             scales + b * chunk.scale_rows * chunk.scale_columns, first_m + warp_m,
             first_n + warp_n, lane);
}

}  // namespace compressops
