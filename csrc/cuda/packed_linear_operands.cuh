// Activations and codes on their way from shared memory into the products of packed_linear.cuh.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

// How a type of activations is staged and multiplied, in blocks of 16 inputs. Of each a lane has
// the inputs 4 (lane % 4) … + 3: as the right operand those of row lane / 4, as the left one the
// codes of the outputs lane / 4 and that + 8.
//
// In 16 bits. A code c ORed to the magic number is the number base + c; the pairs of a word that
// are 16 bits apart are the inputs 0, 2 and 1, 3 of a lane's four, and x's are put in that order.
template <class Input>
struct PackedLinearOperands {
  using Sum = float;
  static constexpr int kChunks = 8;  // 16-byte chunks in a row of a step
  // In shared memory, so that the rows that are read at once lie in different groups of banks.
  static constexpr int kRowChunks = 10;
  static constexpr uint32_t kMagic = std::is_same_v<Input, __half> ? 0x64006400u : 0x43004300u;

  // For `unpack`, of the zero point in byte `byte` of a word: less the numbers that codes have.
  static __device__ __forceinline__ uint32_t zero_word(uint32_t zeros, int byte) {
    return __byte_perm(zeros, kMagic ^ 0x80008000u,
                       0x5050u + 0x0101u * static_cast<unsigned>(byte));
  }
  // One block of all rows.
  template <int kTilesM>
  static __device__ __forceinline__ void load(Shared<int4> stage, int block, int lane,
                                              uint32_t (&right)[kTilesM][2]) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      const int at = (8 * i + lane / 4) * kRowChunks + 2 * block;
      const int2 pair = view_as<int2>(stage)[2 * at + lane % 4];
      const uint32_t low = static_cast<uint32_t>(pair.x), high = static_cast<uint32_t>(pair.y);
      right[i][0] = __byte_perm(low, high, 0x5410);
      right[i][1] = __byte_perm(low, high, 0x7632);
    }
  }
  // The codes less zero at `shift` and 16 bits on, and at `shift` + 8 and 16 bits on.
  template <int kBits, bool kCentred>
  static __device__ __forceinline__ void unpack(uint32_t word, int shift, uint32_t zero,
                                                uint32_t* first, uint32_t* second) {
    static_assert(kCentred);  // base + c would be 32 times as large
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u;
    *first = add_pair<Input>(and_or<kMask, kMagic>(word >> shift), zero);
    *second = add_pair<Input>(and_or<kMask, kMagic>(word >> (shift + 8)), zero);
  }
  template <int kBlocks>
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const uint32_t (&left)[4],
                                                  const uint32_t (&right)[2]) {
    mma_m16n8k16<Input>(sums, left, right);
  }
};

// In int8; `load` and `unpack` give two blocks, `block` and the next.
template <>
struct PackedLinearOperands<int8_t> {
  using Sum = int;
  static constexpr int kChunks = 4, kRowChunks = 5;

  static __device__ __forceinline__ uint32_t zero_word(uint32_t zeros, int byte) {
    return __byte_perm(zeros, 0, 0x1111u * static_cast<unsigned>(byte));
  }
  template <int kTilesM>
  static __device__ __forceinline__ void load(Shared<int4> stage, int block, int lane,
                                              uint32_t (&right)[kTilesM][2]) {
    // Two row tiles at once; a single one twice. The last block has none after it.
    static_assert(kTilesM == 1 || kTilesM % 2 == 0);
#pragma unroll
    for (int i = 0; i < kTilesM; i += 2) {
      const int row = 8 * i + (kTilesM == 1 ? 0 : lane / 16 * 8) + lane % 8;
      uint32_t fragment[4];
      ldmatrix_x4(fragment, stage + (row * kRowChunks + min(block + lane / 8 % 2, kChunks - 1)));
      right[i][0] = fragment[0];
      right[i][1] = fragment[1];
      if constexpr (kTilesM > 1) {
        right[i + 1][0] = fragment[2];
        right[i + 1][1] = fragment[3];
      }
    }
  }
  // Four codes each, less zero if they are to be centred: with its highest bit set no byte borrows
  // from the next.
  template <int kBits, bool kCentred>
  static __device__ __forceinline__ void unpack(uint32_t word, int shift, uint32_t zero,
                                                uint32_t* first, uint32_t* second) {
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
    const auto codes = [&](uint32_t shifted) {
      if constexpr (!kCentred) return shifted & kMask;
      return (and_or<kMask, 0x80808080u>(shifted) - zero) ^ 0x80808080u;
    };
    *first = codes(word >> shift);
    *second = codes(word >> (shift + kBits));
  }
  template <int kBlocks>
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const uint32_t (&left)[4],
                                                  const uint32_t (&right)[2]) {
    if constexpr (kBlocks == 2) {
      mma_m16n8k32_s8(sums, left, right);
    } else {
      mma_m16n8k16_s8(sums, left[0], left[1], right[0]);
    }
  }
};

}  // namespace compressops
