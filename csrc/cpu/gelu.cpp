#include "gelu.h"

#include "cpu_features.h"

namespace compressops::cpu {

Gelu gelu() {
#if defined(__x86_64__)
  if (features().avx512) return gelu_avx512;
  if (features().avx2) return gelu_avx2;
#endif
  return gelu_baseline;
}

}  // namespace compressops::cpu
