#include <string.h>

#include "winograd_conv2d.h"

namespace compressops::cpu {
namespace {

// 6 × 2 sums, 2 vectors of weights and a broadcast value fill the 16 registers.
constexpr int kRegisterRows = 6;

#include "simd_baseline.h"
#include "winograd_conv2d_simd.h"

}  // namespace

const WinogradConv2dKernels& winograd_conv2d_baseline() {
  static constexpr WinogradConv2dKernels instance = kernels("baseline");
  return instance;
}

}  // namespace compressops::cpu
