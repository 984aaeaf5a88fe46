#if defined(__x86_64__)
// For this file alone: everything below may use these instructions, and is called only where
// features() says that the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,vpclmulqdq"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,vpclmulqdq")
#endif

#include <immintrin.h>
#include <stdint.h>

#include "crc32.h"

namespace compressops::cpu {
namespace {

// In each 16 bytes, as in crc32_avx2.cpp.
inline __m512i fold(__m512i rows, __m512i powers, __m512i there) {
  const __m512i low = _mm512_clmulepi64_epi128(rows, powers, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(rows, powers, 0x11);
  return _mm512_ternarylogic_epi64(low, high, there, 0x96);
}

inline __m512i powers(uint64_t of_low, uint64_t of_high) {
  return _mm512_set4_epi64((long long)of_high, (long long)of_low, (long long)of_high,
                           (long long)of_low);
}

}  // namespace

uint32_t crc32_avx512(const uint8_t* data, int64_t bytes) {
  if (bytes < 256) return crc32_avx2(data, bytes);
  const __m512i by_2048 = powers(crc32_fold(2080), crc32_fold(2016));
  const __m512i by_512 = powers(crc32_fold(544), crc32_fold(480));
  __m512i rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = _mm512_loadu_si512(data + 64 * i);
  rows[0] = _mm512_xor_si512(rows[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1)));
  data += 256;
  bytes -= 256;
  for (; bytes >= 256; data += 256, bytes -= 256)
    for (int i = 0; i < 4; ++i) rows[i] = fold(rows[i], by_2048, _mm512_loadu_si512(data + 64 * i));
  __m512i rest = rows[0];
  for (int i = 1; i < 4; ++i) rest = fold(rest, by_512, rows[i]);
  for (; bytes >= 64; data += 64, bytes -= 64) rest = fold(rest, by_512, _mm512_loadu_si512(data));
  uint8_t last[64];
  _mm512_storeu_si512(last, rest);
  return ~crc32_update(crc32_update(0, last, 64), data, bytes);
}

}  // namespace compressops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
