#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,pclmul"))), apply_to = function)
#else
#pragma GCC target("avx2,pclmul")
#endif

#include <immintrin.h>
#include <stdint.h>

#include "crc32.h"

namespace compressops::cpu {
namespace {

// 16 bytes, moved on by as many bits as `powers` were made for, and added to those that are there.
inline __m128i fold(__m128i sixteen, __m128i powers, __m128i there) {
  const __m128i low = _mm_clmulepi64_si128(sixteen, powers, 0x00);
  const __m128i high = _mm_clmulepi64_si128(sixteen, powers, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

inline __m128i load(const uint8_t* data) { return _mm_loadu_si128((const __m128i*)data); }

}  // namespace

// Folding by carry-less products (Gopal et al., Intel 2009): four rows of 16 bytes go over the
// data; what remains of it is a text of 16 bytes with the same CRC.
uint32_t crc32_avx2(const uint8_t* data, int64_t bytes) {
  if (bytes < 64) return crc32_baseline(data, bytes);
  const __m128i by_512 = _mm_set_epi64x((long long)crc32_fold(480), (long long)crc32_fold(544));
  const __m128i by_128 = _mm_set_epi64x((long long)crc32_fold(96), (long long)crc32_fold(160));
  __m128i rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = load(data + 16 * i);
  rows[0] = _mm_xor_si128(rows[0], _mm_cvtsi32_si128(-1));
  data += 64;
  bytes -= 64;
  for (; bytes >= 64; data += 64, bytes -= 64)
    for (int i = 0; i < 4; ++i) rows[i] = fold(rows[i], by_512, load(data + 16 * i));
  __m128i rest = rows[0];
  for (int i = 1; i < 4; ++i) rest = fold(rest, by_128, rows[i]);
  for (; bytes >= 16; data += 16, bytes -= 16) rest = fold(rest, by_128, load(data));
  uint8_t last[16];
  _mm_storeu_si128((__m128i*)last, rest);
  return ~crc32_update(crc32_update(0, last, 16), data, bytes);
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
