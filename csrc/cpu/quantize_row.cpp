#include "quantize_row.h"

#include "cpu_features.h"

namespace compressops::cpu {

QuantizeRow quantize_row() {
#if defined(__x86_64__)
  if (features().avx512) return quantize_row_avx512;
  if (features().avx2) return quantize_row_avx2;
#endif
  return quantize_row_baseline;
}

}  // namespace compressops::cpu
