// CRC-32 as of zlib, by segments: that of a text is the sum (exclusive or) of those of its
// segments, each times a power of x for what follows it.
#pragma once

#include "device.cuh"

namespace compressops {

constexpr uint32_t kCrcPolynomial = 0xedb88320u;
// 17 words: lanes that read segments side by side then meet no bank twice.
constexpr int kCrcSegmentBytes = 68;
// Of 32,768 codes of 12 bits.
constexpr int kCrcSegments = 723;

// One step of the remainder: times x.
__host__ __device__ constexpr uint32_t crc_times_x(uint32_t value) {
  return value >> 1 ^ ((value & 1) != 0 ? kCrcPolynomial : 0);
}

// What byte `byte` becomes when a byte follows it.
__device__ __forceinline__ uint32_t crc_byte(unsigned byte) {
  uint32_t state = byte;
#pragma unroll
  for (int bit = 0; bit < 8; ++bit) state = crc_times_x(state);
  return state;
}

__device__ __forceinline__ uint32_t crc_step(Shared<uint32_t> table, uint32_t state,
                                             unsigned byte) {
  return state >> 8 ^ table[(state ^ byte) & 255u];
}

// a · b modulo the polynomial; the highest bit is the coefficient of x^0.
__host__ __device__ constexpr uint32_t crc_product(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 31; i >= 0; --i) {
    if ((b >> i & 1) != 0) product ^= a;
    a = crc_times_x(a);
  }
  return product;
}

// x to the bits of 2^k segments.
struct CrcSquares {
  uint32_t of[10];
};
__host__ __device__ constexpr CrcSquares crc_squares() {
  CrcSquares squares{};
  uint32_t power = 0x80000000u;
  for (int bit = 0; bit < 8 * kCrcSegmentBytes; ++bit) power = crc_times_x(power);
  for (int k = 0; k < 10; ++k) {
    squares.of[k] = power;
    power = crc_product(power, power);
  }
  return squares;
}

// x to the bits of so many segments.
__device__ __forceinline__ uint32_t crc_power(unsigned segments) {
  constexpr CrcSquares kSquares = crc_squares();
  uint32_t power = 0x80000000u;
#pragma unroll
  for (int k = 0; k < 10; ++k) {
    if ((segments >> k & 1) != 0) power = crc_product(power, kSquares.of[k]);
  }
  return power;
}

}  // namespace compressops
