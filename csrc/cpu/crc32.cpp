#include "crc32.h"

#include <array>
#include <cstring>

#include "cpu_features.h"

namespace compressops::cpu {
namespace {

// Row k: what a byte becomes when k zero bytes follow it.
constexpr auto kTable = [] {
  std::array<std::array<uint32_t, 256>, 8> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t state = byte;
    for (int bit = 0; bit < 8; ++bit) state = state >> 1 ^ (state & 1 ? kCrc32Polynomial : 0);
    table[0][byte] = state;
  }
  for (size_t k = 1; k < table.size(); ++k)
    for (uint32_t byte = 0; byte < 256; ++byte)
      table[k][byte] = table[k - 1][byte] >> 8 ^ table[0][table[k - 1][byte] & 255];
  return table;
}();

}  // namespace

uint32_t crc32_update(uint32_t state, const uint8_t* data, int64_t bytes) {
  for (; bytes >= 8; data += 8, bytes -= 8) {
    uint64_t eight;
    std::memcpy(&eight, data, sizeof(eight));
    eight ^= state;
    state = 0;
    for (int k = 0; k < 8; ++k) state ^= kTable[7 - k][eight >> (8 * k) & 255];
  }
  for (; bytes > 0; ++data, --bytes) state = state >> 8 ^ kTable[0][(state ^ *data) & 255];
  return state;
}

uint32_t crc32_baseline(const uint8_t* data, int64_t bytes) {
  return ~crc32_update(~uint32_t{0}, data, bytes);
}

Crc32 crc32() {
#if defined(__x86_64__)
  if (features().avx512_vbmi2) return crc32_avx512;
  if (features().avx2) return crc32_avx2;
#endif
  return crc32_baseline;
}

}  // namespace compressops::cpu
