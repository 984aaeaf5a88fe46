// round_rows: rows of activations as the integer products see them, in floats, as ops/round_rows.py
// defines it and bit for bit.
//
// Each element is read from memory and written once; the second reading comes from L1 or L2. Rows
// of attention's operands are short, 32 to 512 elements: lanes of a warp share a row, with 16
// elements each at a time, and a warp has as many rows as it has such groups of lanes.
#pragma once

#include "quantize_rows.cuh"

namespace compressops {

// Where rows begin: up to three dimensions, the innermost last. Those of attention's heads are
// parts of wider rows, and are read there.
struct StridedRows {
  int64_t sizes[3], strides[3];

  __host__ __device__ int64_t count() const { return sizes[0] * sizes[1] * sizes[2]; }
  __host__ __device__ int64_t offset(int64_t row) const {
    const int64_t outer = row / sizes[2];
    return outer / sizes[1] * strides[0] + outer % sizes[1] * strides[1] +
           row % sizes[2] * strides[2];
  }
};

template <class T>
struct RoundRowsArgs {
  StridedRows rows;
  int64_t K;
  Global<const T> x;
  Global<T> y;  // [rows, K]
};

// The largest number of the type.
template <class T>
constexpr unsigned kLargestBits = 0x7f7fffffu;
template <>
inline constexpr unsigned kLargestBits<__half> = 0x477fe000u;
template <>
inline constexpr unsigned kLargestBits<__nv_bfloat16> = 0x7f7f0000u;

// What the code of a value stands for. Zero point and scale are rounded, so that the end of a range
// may lie past it, and past the type's end: never further.
template <class T>
__device__ __forceinline__ float rounded_value(float value, const RowCodes& codes) {
  const float largest = __uint_as_float(kLargestBits<T>);
  const float rounded = __fmul_rn(static_cast<float>(quantize_int(value, codes)), codes.scale);
  return rounded > largest ? largest : rounded < -largest ? -largest : rounded;  // NaN stays
}

// 16 floats to a row that has `count` elements left, if that is fewer. `aligned`: to 16 bytes.
template <class T>
__device__ __forceinline__ void store_16_floats(const Global<T>& row, int64_t count, bool aligned,
                                                const float (&values)[16]) {
  if (aligned && count >= 16) {
#pragma unroll
    for (int store = 0; store < static_cast<int>(sizeof(T)); ++store) {
      int words[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float elements[kPerWord<T>];
#pragma unroll
        for (int i = 0; i < kPerWord<T>; ++i) {
          elements[i] = values[(4 * store + word) * kPerWord<T> + i];
        }
        words[word] = static_cast<int>(pack_word<T>(elements));
      }
      view_as<int4>(row)[store] = make_int4(words[0], words[1], words[2], words[3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < count) row[i] = from_float<T>(values[i]);
    }
  }
}

constexpr int kRoundRowsThreads = 128;

// kLanes lanes a row.
template <class T, RowScaling kScaling, int kLanes>
__global__ void __launch_bounds__(kRoundRowsThreads, 8)
    round_rows(RoundRowsArgs<T> args, bool x_aligned, bool y_aligned) {
  constexpr int kSides = kScaling == RowScaling::kAsymmetric ? 2 : 1;
  constexpr int kRows = kRoundRowsThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t count = args.rows.count();

  for (int64_t first = int64_t{blockIdx.x} * kRows; first < count;
       first += int64_t{gridDim.x} * kRows) {
    const int64_t row = first + static_cast<int>(threadIdx.x) / kLanes;
    // Lanes past the last row shuffle with the others, of a row of nothing.
    const int64_t K = row < count ? args.K : 0;
    const Global<const T> x = args.x + (row < count ? args.rows.offset(row) : 0);
    unsigned bits[2] = {0, 0};
    widen_range<T, kLanes, kSides>(lane, x, 0, K, x_aligned, bits);
#pragma unroll
    for (int side = 0; side < kSides; ++side) bits[side] = lanes_max<kLanes>(bits[side]);
    const RowCodes codes = row_codes<kScaling>(bits[0], bits[1], RowZeros{});
    for (int64_t k = int64_t{16} * lane; k < K; k += 16 * kLanes) {
      float values[16];
      load_16_floats<T>(x + k, K - k, x_aligned, values);
#pragma unroll
      for (int i = 0; i < 16; ++i) values[i] = rounded_value<T>(values[i], codes);
      store_16_floats<T>(args.y + (row * args.K + k), K - k, y_aligned, values);
    }
  }
}

template <class T, RowScaling kScaling>
cudaError_t launch_round_rows(const RoundRowsArgs<T>& args, cudaStream_t stream,
                              int64_t max_blocks = 0x7fffffff) {
  const int64_t count = args.rows.count();
  if (count == 0 || args.K == 0) return cudaSuccess;
  const auto aligned = [](int64_t elements) { return elements * int64_t{sizeof(T)} % 16 == 0; };
  bool x_aligned = misalignment(args.x, 16) == 0;
  for (int i = 0; i < 3; ++i) {
    x_aligned = x_aligned && (args.rows.sizes[i] == 1 || aligned(args.rows.strides[i]));
  }
  const bool y_aligned = misalignment(args.y, 16) == 0 && aligned(args.K);
  const int lanes = args.K <= 2 * 16 ? 2 : args.K <= 8 * 16 ? 8 : kWarpSize;
  const int64_t blocks = ceil_div<int64_t>(count, kRoundRowsThreads / lanes);
  return launch(lanes == 2   ? round_rows<T, kScaling, 2>
                : lanes == 8 ? round_rows<T, kScaling, 8>
                             : round_rows<T, kScaling, kWarpSize>,
                dim3(static_cast<unsigned>(blocks < max_blocks ? blocks : max_blocks)),
                dim3(kRoundRowsThreads), 0, stream, args, x_aligned, y_aligned);
}

}  // namespace compressops
