#include <stdint.h>

#include "int8_conv2d.h"

namespace compressops::cpu {
namespace {

#include "int8_conv2d_loops.h"

void multiply(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
              const int8_t* weight, int64_t panel_bytes, int rows, int panels, int32_t* sums,
              int64_t sums_stride) {
  for (int m = 0; m < rows; ++m) {
    for (int p = 0; p < panels; ++p) {
      int32_t* out = sums + m * sums_stride + p * kConvColumns;
      // Unsigned, because codes that are not centred may carry a sum past 2^31; that is undone
      // modulo 2^32.
      uint32_t total[kConvColumns] = {};
      const int8_t* w = weight + p * panel_bytes;
      for (int64_t i = 0; i < run_count; ++i) {
        const uint8_t* x = pixels[m] + runs[i].offset;
        for (int64_t b = 0; b < runs[i].blocks; ++b, x += kConvDepth)
          for (int n = 0; n < kConvColumns; ++n, w += kConvDepth)
            total[n] += (uint32_t)(x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3]);
      }
      __builtin_memcpy(out, total, sizeof(total));
    }
  }
}

}  // namespace

const Int8Conv2dKernels& int8_conv2d_baseline() {
  static constexpr Int8Conv2dKernels kernels = {
      "baseline", range, quantize_planes, quantize_pixels, multiply, multiply_depthwise, finish};
  return kernels;
}

}  // namespace compressops::cpu
