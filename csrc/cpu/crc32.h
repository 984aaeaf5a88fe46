// CRC-32 as of zlib, gzip and PNG (polynomial 0x04c11db7, reflected). This header is included by
// translation units that are compiled for different instruction sets, so it defines no function
// but constexpr ones that run while compiling.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

using Crc32 = uint32_t (*)(const uint8_t* data, int64_t bytes);

uint32_t crc32_baseline(const uint8_t* data, int64_t bytes);
uint32_t crc32_avx2(const uint8_t* data, int64_t bytes);
uint32_t crc32_avx512(const uint8_t* data, int64_t bytes);

// The one of them that suits the processor.
Crc32 crc32();

// Goes on from `state`, which is that of an empty text where it is ~0, and is not inverted again.
uint32_t crc32_update(uint32_t state, const uint8_t* data, int64_t bytes);

constexpr uint32_t kCrc32Polynomial = 0xedb88320u;

// x^n modulo the polynomial, in the place where a carry-less product of reflected words wants it.
consteval uint64_t crc32_fold(int n) {
  uint32_t power = 0x80000000u;  // x^0
  for (int i = 0; i < n; ++i) power = power >> 1 ^ (power & 1 ? kCrc32Polynomial : 0);
  return uint64_t{power} << 1;
}

}  // namespace compressops::cpu
