// simd.h for any processor. Included inside the anonymous namespace of a translation unit that is
// compiled for it, after <stdint.h> and <string.h>.

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));

inline Vec widen(Short bits) {
  Vec out = {};
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffu;
    // Scaling by 2^112 maps the exponents, and subnormals, exactly; Inf and NaN are apart.
    float value;
    const uint32_t shifted =
        magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : magnitude << 13;
    memcpy(&value, &shifted, sizeof(value));
    if (magnitude < 0x7c00u) value *= 0x1p112f;
    out[i] = bits[i] & 0x8000u ? -value : value;
  }
  return out;
}

inline Short narrow(Vec value) {
  Short out = {};
  for (int i = 0; i < kLanes; ++i) {
    const float element = value[i];
    uint32_t raw;
    memcpy(&raw, &element, sizeof(raw));
    const uint32_t sign = raw >> 16 & 0x8000u;
    uint32_t magnitude = raw & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      magnitude = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
      magnitude = 0x7c00u;  // 65520 and more round to Inf
    } else if (magnitude < 0x38800000u) {
      // Subnormal: the addition rounds to a multiple of 2^-24, to the nearest even.
      float positive;
      memcpy(&positive, &magnitude, sizeof(positive));
      positive += 0.5f;
      memcpy(&magnitude, &positive, sizeof(magnitude));
      magnitude -= 0x3f000000u;
    } else {
      magnitude = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    }
    out[i] = (uint16_t)(sign | magnitude);
  }
  return out;
}
inline Vec load_first(const float* from, int64_t count) {
  Vec out = {};
  memcpy(&out, from, count * sizeof(float));
  return out;
}
inline void store_first(float* to, int64_t count, Vec value) {
  memcpy(to, &value, count * sizeof(float));
}

#include "simd.h"
