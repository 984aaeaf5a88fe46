// How the kernels of block-sparse weights stage and multiply a type of operands, in pieces of 16
// bytes, and what they have in common. A matrix in shared memory has rows of 2, 4, 8 or 16 pieces.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

// Where piece `piece` of row `row` lies. Eight rows in succession, of which ldmatrix reads one
// piece each, lie in eight groups of banks.
template <int kPieces>
__device__ __forceinline__ int bsr_place(int row, int piece) {
  if constexpr (kPieces > 8) {
    return row * kPieces + piece;
  } else {
    return row * kPieces + (piece ^ row / (8 / kPieces) % kPieces);
  }
}

// 16 bytes of a row of blocks from input k on, zeros past K, of which it has some.
template <class Input>
__device__ __forceinline__ int4 load_some(Global<const Input> values, int64_t count) {
  constexpr int kSize = static_cast<int>(sizeof(Input));
  unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16 / kSize; ++i) {
    if (i >= count) continue;
    if constexpr (kSize == 4) {
      words[i] = __float_as_uint(load_nc<Input>(values, i));
    } else if constexpr (kSize == 2) {
      const unsigned bits = load_nc<uint16_t>(view_as<const uint16_t>(values), i);
      words[i / 2] |= bits << 16 * (i % 2);
    } else {
      words[i / 4] |= static_cast<unsigned>(static_cast<uint8_t>(load_nc<Input>(values, i)))
                      << 8 * (i % 4);
    }
  }
  return make_int4(static_cast<int>(words[0]), static_cast<int>(words[1]),
                   static_cast<int>(words[2]), static_cast<int>(words[3]));
}

// Products of 16 kTilesM rows of x with a cell, 16 outputs of one chunk of inputs. Lanes hold the
// sums as mma.sync has them: rows lane / 4 + 8 i, and outputs 2 (lane % 4) + odd + 8 half.
//
// In 16 bits, and in int8 with chunks of twice as many inputs.
template <class Input>
struct BsrOperands {
  static constexpr bool kInt = sizeof(Input) == 1;
  using Sum = std::conditional_t<kInt, int, float>;
  static constexpr int kInputs = kInt ? 32 : 16;  // of a chunk
  static constexpr int kPieces = 2;               // of a row of it

  template <int kTilesM>
  struct Rows {
    uint32_t words[kTilesM][4];
  };
  template <int kTilesM>
  static __device__ __forceinline__ void load(Shared<int4> x, int first, int lane,
                                              Rows<kTilesM>& rows) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      ldmatrix_x4(rows.words[i], x + bsr_place<kPieces>(first + 16 * i + lane % 16, lane / 16));
    }
  }
  // kTransposed: the cell's rows are inputs.
  template <int kTilesM, bool kTransposed>
  static __device__ __forceinline__ void multiply(Sum (&sums)[kTilesM][2][4],
                                                  const Rows<kTilesM>& rows, Shared<int4> cell,
                                                  int lane) {
    uint32_t words[4];
    if constexpr (kTransposed) {
      // Matrices: both halves of the inputs of outputs 0-7, then of 8-15.
      ldmatrix_x4_trans(words, cell + bsr_place<kPieces>(lane % 16, lane / 16));
    } else {
      // Matrices: both pieces of outputs 0-7, then of 8-15.
      ldmatrix_x4(words, cell + bsr_place<kPieces>(lane / 16 * 8 + lane % 8, lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t right[2] = {words[2 * half], words[2 * half + 1]};
        if constexpr (kInt) {
          mma_m16n8k32_s8(sums[i][half], rows.words[i], right);
        } else {
          mma_m16n8k16<Input>(sums[i][half], rows.words[i], right);
        }
      }
    }
  }
};

// In float32: fused multiply-adds, 16 sums of a lane for 8 pieces that it reads.
template <>
struct BsrOperands<float> {
  using Sum = float;
  static constexpr int kInputs = 16, kPieces = 4;

  template <int kTilesM>
  struct Rows {
    Shared<int4> x;
    int first;
  };
  template <int kTilesM>
  static __device__ __forceinline__ void load(Shared<int4> x, int first, int /*lane*/,
                                              Rows<kTilesM>& rows) {
    rows = {x, first};
  }
  template <int kTilesM, bool kTransposed>
  static __device__ __forceinline__ void multiply(Sum (&sums)[kTilesM][2][4],
                                                  const Rows<kTilesM>& rows, Shared<int4> cell,
                                                  int lane) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      float left[2 * kTilesM][4];
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {
        as_floats(rows.x[bsr_place<kPieces>(rows.first + 8 * i + lane / 4, piece)], left[i]);
      }
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const int out = column / 2 * 8 + 2 * (lane % 4) + column % 2;
        float right[4];
        if constexpr (kTransposed) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            right[e] =
                view_as<float>(cell)[4 * bsr_place<kPieces>(4 * piece + e, out / 4) + out % 4];
          }
        } else {
          as_floats(cell[bsr_place<kPieces>(out, piece)], right);
        }
#pragma unroll
        for (int i = 0; i < 2 * kTilesM; ++i) {
          float& sum = sums[i / 2][column / 2][i % 2 * 2 + column % 2];
#pragma unroll
          for (int e = 0; e < 4; ++e) sum += left[i][e] * right[e];
        }
      }
    }
  }
};

}  // namespace compressops
