#include <string.h>

#include "bsr_linear.h"

namespace compressops::cpu {
namespace {

constexpr int kMostRows = 2;
constexpr int kNarrowRows = 1;
constexpr bool kIntegers = true;

#include "simd_baseline.h"

typedef int32_t Signed __attribute__((vector_size(kLanes * 4)));

inline Vec add_products(Vec sums, Vec x, Vec weights) {
  Bits total = (Bits)sums;
  for (int i = 0; i < 4; ++i) {
    const Bits code = ((Bits)x >> 8 * i) & 255;
    total += code * (Bits)((Signed)((Bits)weights << (24 - 8 * i)) >> 24);
  }
  return (Vec)total;
}
inline Vec add_sums(Vec a, Vec b) { return (Vec)((Bits)a + (Bits)b); }

#include "bsr_int8_linear_simd.h"
#include "bsr_linear_simd.h"

}  // namespace

const BsrLinearKernels& bsr_int8_linear_baseline() {
  static constexpr BsrLinearKernels instance = kernels("baseline", scale);
  return instance;
}

}  // namespace compressops::cpu
