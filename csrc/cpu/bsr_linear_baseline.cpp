#include <string.h>

#include "bsr_linear.h"

namespace compressops::cpu {
namespace {

// 2 × 4 sums, 4 vectors of weights and a broadcast item fit into 16 registers.
constexpr int kMostRows = 2;
constexpr int kNarrowRows = 2;
constexpr bool kIntegers = false;

#include "simd_baseline.h"

inline Vec add_products(Vec sums, Vec x, Vec weights) { return sums + x * weights; }
inline Vec add_sums(Vec a, Vec b) { return a + b; }

#include "bsr_linear_simd.h"

}  // namespace

const BsrLinearKernels& bsr_linear_baseline() {
  static constexpr BsrLinearKernels instance = kernels("baseline", nullptr);
  return instance;
}

}  // namespace compressops::cpu
