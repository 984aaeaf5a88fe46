// Dynamic activation quantization: each row of a float matrix to int8 with a scale of its own,
// amax / 127. Shared by the ops whose activations are 8 bits wide.
#pragma once

#include "device.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace compressops {

// Rows of q are padded with zeros, so that they can be read 16 bytes at a time.
__host__ __device__ constexpr int64_t padded_to_16(int64_t K) {
  return ceil_div<int64_t>(K, 16) * 16;
}

// Up to 16 elements of a row as float, zeros past `count`. `aligned`: the row is 16-byte aligned.
template <class T>
__device__ __forceinline__ void load_16_floats(Global<const T> row, int64_t count, bool aligned,
                                               float (&values)[16]) {
  if (aligned && count >= 16) {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int load = 0; load < static_cast<int>(sizeof(T)); ++load) {
      const int4 vector = load_nc<int4>(view_as<const int4>(row), load);
      const int words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
          const unsigned bits = static_cast<unsigned>(words[word]) >> (32 / kPerWord * i);
          values[(4 * load + word) * kPerWord + i] = float_from_bits<T>(bits);
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) values[i] = i < count ? to_float(load_nc<T>(row, i)) : 0.0f;
  }
}

// round_half_even(value · inverse) clamped to ±127, as a byte. NaN (0 · inf, where the row's amax
// is so small that 127 / amax overflows) becomes 0.
__device__ __forceinline__ unsigned quantize_byte(float value, float inverse) {
  const float scaled = __fmul_rn(value, inverse);
  const float clamped = scaled > 127.0f ? 127.0f : scaled < -127.0f ? -127.0f : scaled;
  return static_cast<unsigned>(__float2int_rn(clamped)) & 0xffu;
}

// One block a row. The second reading of the row comes from L1 or L2.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, 8)
    quantize_rows(Global<const T> x, int64_t row_stride, bool aligned, int64_t M, int64_t K,
                  Global<int8_t> q, Global<float> x_scales) {
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr unsigned kInfinityBits = 0x7f800000u;
  COMPRESSOPS_SHARED_ARRAY(unsigned, warp_amax, kWarps);
  const int64_t padded_k = padded_to_16(K);
  const int thread = static_cast<int>(threadIdx.x);

  for (int64_t row = blockIdx.x; row < M; row += gridDim.x) {
    // Bit patterns of magnitudes order like the magnitudes, with NaN above infinity: an integer
    // maximum keeps NaN, which fmaxf would drop.
    unsigned amax_bits = 0;
    for (int64_t k = int64_t{16} * thread; k < K; k += 16 * kThreads) {
      float values[16];
      load_16_floats<T>(x + (row * row_stride + k), K - k, aligned, values);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        amax_bits = max(amax_bits, __float_as_uint(values[i]) & 0x7fffffffu);
      }
    }
    amax_bits = warp_max(amax_bits);
    if (thread % kWarpSize == 0) warp_amax[thread / kWarpSize] = amax_bits;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const unsigned other = warp_amax[warp];
      amax_bits = max(amax_bits, other);
    }
    __syncthreads();  // the next row writes warp_amax again

    const bool finite = amax_bits < kInfinityBits;
    const float amax = __uint_as_float(amax_bits);
    const float inverse = finite && amax_bits > 0 ? __fdiv_rn(127.0f, amax) : 0.0f;
    if (thread == 0) {
      // A row with NaN or infinity in it gives NaN everywhere, through its scale.
      x_scales[row] = finite ? __fdiv_rn(amax, 127.0f) : __uint_as_float(0x7fc00000u);
    }
    for (int64_t k = int64_t{16} * thread; k < padded_k; k += 16 * kThreads) {
      float values[16];
      load_16_floats<T>(x + (row * row_stride + k), K - k, aligned, values);
      unsigned packed[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        packed[word] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = finite ? values[4 * word + i] : 0.0f;
          packed[word] |= quantize_byte(value, inverse) << (8 * i);
        }
      }
      view_as<int4>(q + (row * padded_k + k))[0] =
          make_int4(static_cast<int>(packed[0]), static_cast<int>(packed[1]),
                    static_cast<int>(packed[2]), static_cast<int>(packed[3]));
    }
  }
}

constexpr int kQuantizeThreads = 128;

// Quantizes x[M, K], whose rows are row_stride elements apart, into q[M, padded_to_16(K)] and
// x_scales[M]. `max_blocks` bounds the grid.
template <class T>
cudaError_t launch_quantize_rows(Global<const T> x, int64_t row_stride, int64_t M, int64_t K,
                                 Global<int8_t> q, Global<float> x_scales, cudaStream_t stream,
                                 int64_t max_blocks = 0x7fffffff) {
  if (M == 0) return cudaSuccess;
  const bool aligned = misalignment(x, 16) == 0 && row_stride * int64_t{sizeof(T)} % 16 == 0;
  return launch(quantize_rows<T, kQuantizeThreads>,
                dim3(static_cast<unsigned>(M < max_blocks ? M : max_blocks)),
                dim3(kQuantizeThreads), 0, stream, x, row_stride, aligned, M, K, q, x_scales);
}

}  // namespace compressops
