// The arguments of int4_linear's and ternary_linear's kernels, see packed_linear.cuh.
#pragma once

#include "activation.cuh"
#include "device.cuh"
#include "float_type.cuh"

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
  Global<unsigned> tickets;  // zeros, one a tile, and left as zeros; null for one split
  FloatType y_type;
  Global<uint8_t> y;  // [M, N]
};

template <int kBits>
constexpr uint32_t kMiddleCode = kBits == 4 ? 8 : 1;
template <int kBits>
constexpr bool kHasZeros = kBits == 4;  // or the middle code is always the zero
template <int kBits>
constexpr int kLaneOutputs = kBits == 4 ? 2 : 4;  // of a lane in a tile of codes

}  // namespace compressops
