// Activations and codes on their way from shared memory into the products of packed_linear.cuh.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "ptx.cuh"
#include "tiles.cuh"

namespace compressops {

// How a type of activations is staged and multiplied, in blocks of 16 inputs. Of each a lane has
// the inputs 4 (lane % 4) … + 3, of row lane / 4 and that + 8, and of output lane / 4.
//
// In 16 bits. A code c ORed to the magic number is the number base + c; the pairs of a word that
// are 16 bits apart are the inputs 0, 2 and 1, 3 of a lane's four, and x's are put in that order.
template <class Input>
struct PackedLinearOperands {
  using Sum = float;
  static constexpr int kChunks = 8;  // 16-byte chunks in a row of a step
  static constexpr uint32_t kMagic = std::is_same_v<Input, __half> ? 0x64006400u : 0x43004300u;

  // The four rows that half a warp reads lie in four different groups of banks.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kChunks + (chunk ^ (2 * (row % 4)));
  }
  static __device__ __forceinline__ uint32_t zero_word(uint32_t zero) {
    return kMagic | zero | zero << 16;
  }
  // Rows first … + 15 of one block.
  static __device__ __forceinline__ void load(Shared<int4> stage, int first, int block, int lane,
                                              uint32_t (&left)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = place(first + 8 * half + lane / 4, 2 * block + lane % 4 / 2);
      const int2 pair = view_as<int2>(stage)[2 * at + lane % 2];
      left[half] =
          __byte_perm(static_cast<uint32_t>(pair.x), static_cast<uint32_t>(pair.y), 0x5410);
      left[2 + half] =
          __byte_perm(static_cast<uint32_t>(pair.x), static_cast<uint32_t>(pair.y), 0x7632);
    }
  }
  // The codes less zero at `shift` and 16 bits on, and at `shift` + 8 and 16 bits on.
  template <int kBits>
  static __device__ __forceinline__ void unpack(uint32_t word, int shift, uint32_t zero,
                                                uint32_t* first, uint32_t* second) {
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u;
    *first = subtract_pair<Input>(and_or<kMask, kMagic>(word >> shift), zero);
    *second = subtract_pair<Input>(and_or<kMask, kMagic>(word >> (shift + 8)), zero);
  }
  template <int kBits, int kBlocks>
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const uint32_t (&left)[4],
                                                  uint32_t word, int shift, int /*block*/,
                                                  uint32_t zero) {
    uint32_t right[2];
    unpack<kBits>(word, shift, zero, &right[0], &right[1]);
    mma_m16n8k16<Input>(sums, left, right);
  }
};

// In int8; `load` gives two blocks, the even one and the next.
template <>
struct PackedLinearOperands<int8_t> {
  using Sum = int;
  static constexpr int kChunks = 4;

  static __device__ __forceinline__ int place(int row, int chunk) { return swizzled(row, chunk); }
  static __device__ __forceinline__ uint32_t zero_word(uint32_t zero) { return zero * 0x01010101u; }
  static __device__ __forceinline__ void load(Shared<int4> stage, int first, int block, int lane,
                                              uint32_t (&left)[4]) {
    ldmatrix_x4(left, stage + place(first + lane % 16, block / 2 * 2 + lane / 16));
  }
  // Four codes less zero, each a byte: with its highest bit set none borrows from the next.
  template <int kBits>
  static __device__ __forceinline__ uint32_t centred(uint32_t word, int shift, uint32_t zero) {
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
    return (((word >> shift & kMask) | 0x80808080u) - zero) ^ 0x80808080u;
  }
  template <int kBits, int kBlocks>
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const uint32_t (&left)[4],
                                                  uint32_t word, int shift, int block,
                                                  uint32_t zero) {
    if constexpr (kBlocks == 2) {
      const uint32_t right[2] = {centred<kBits>(word, shift, zero),
                                 centred<kBits>(word, shift + kBits, zero)};
      mma_m16n8k32_s8(sums, left, right);
    } else {
      const int odd = block % 2 * 2;
      mma_m16n8k16_s8(sums, left[odd], left[odd + 1], centred<kBits>(word, shift, zero));
    }
  }
};

}  // namespace compressops
