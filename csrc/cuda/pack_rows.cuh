// Rows of activations that kernels can read 16 bytes at a time.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

// Rows as the kernels read them: x[M, K], rows row_stride elements apart, to parts[..][M, columns],
// zero padded. float32 becomes the exact sum of three bfloat16, its 24 bits in eights; numbers
// below 2^-110 lose their last bits, and what is not finite stays in the first part.
template <class From, class To>
__global__ void pack_rows(Global<const From> x, int64_t row_stride, int64_t M, int64_t K,
                          int64_t columns, Global<To> parts) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < M * columns; i += stride) {
    const int64_t m = i / columns, k = i % columns;
    float value = k < K ? to_float(load_nc<From>(x, m * row_stride + k)) : 0.0f;
    if constexpr (std::is_same_v<From, To>) {
      parts[i] = from_float<To>(value);
    } else {
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const uint32_t bits = __float_as_uint(value);
        const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        const float top = finite ? __uint_as_float(bits & 0xffff0000u) : value;
        parts[part * M * columns + i] = from_float<To>(top);
        value = finite ? value - top : 0.0f;
      }
    }
  }
}

constexpr int kPackRowsThreads = 256;

template <class From, class To>
cudaError_t launch_pack_rows(Global<const From> x, int64_t row_stride, int64_t M, int64_t K,
                             int64_t columns, Global<To> parts, int64_t multiprocessors,
                             cudaStream_t stream) {
  if (M == 0 || columns == 0) return cudaSuccess;
  const int64_t blocks = min(ceil_div<int64_t>(M * columns, kPackRowsThreads), 8 * multiprocessors);
  return launch(pack_rows<From, To>, dim3(static_cast<unsigned>(blocks)), dim3(kPackRowsThreads), 0,
                stream, x, row_stride, M, K, columns, parts);
}

}  // namespace compressops
