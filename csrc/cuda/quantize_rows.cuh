// Activation quantization: each row of a float matrix to int8, as ops/int8_linear.py defines it and
// bit for bit. Shared by the ops whose activations are 8 bits wide.
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

// Scales: of each row its own, from its largest magnitude or from its range; or given.
enum class RowScaling : int { kSymmetric, kAsymmetric, kStatic };

// The given ones, and where the rows' zero points go; null where there are none.
struct RowZeros {
  Global<const float> static_scale;  // one
  Global<const int8_t> static_zero;  // one, or null: 0
  Global<int> zeros;                 // [M]; null if symmetric
};

// How the values of a row become codes: round_half_even(value · inverse), clamped, plus zero.
struct RowCodes {
  float scale, inverse, least, most;
  int zero;
  bool finite;
};

// `low_bits` and `high_bits`: the largest magnitudes of its negative and other values as bits (all
// in low_bits, if symmetric).
template <RowScaling kScaling>
__device__ __forceinline__ RowCodes row_codes(unsigned low_bits, unsigned high_bits,
                                              const RowZeros& given) {
  constexpr unsigned kInfinityBits = 0x7f800000u;
  RowCodes codes = {__uint_as_float(0x7fc00000u),
                    0.0f,
                    -127.0f,
                    127.0f,
                    0,
                    max(low_bits, high_bits) < kInfinityBits};
  // A row with NaN or infinity in it gives NaN everywhere, through its scale.
  if (!codes.finite) return codes;
  const float low = __uint_as_float(low_bits), high = __uint_as_float(high_bits);
  if constexpr (kScaling == RowScaling::kSymmetric) {
    codes.scale = __fdiv_rn(low, 127.0f);
    codes.inverse = low_bits > 0 ? __fdiv_rn(127.0f, low) : 0.0f;
  } else if constexpr (kScaling == RowScaling::kAsymmetric) {
    // Halved, so that the difference of two large values stays finite.
    const float range = __fadd_rn(__fmul_rn(high, 0.5f), __fmul_rn(low, 0.5f));
    codes.scale = __fdiv_rn(range, 127.5f);
    codes.inverse = range > 0.0f ? __fdiv_rn(127.5f, range) : 0.0f;
    const float lowest = __fmul_rn(low, codes.inverse);  // 0 · inf counts as 0
    codes.zero = __float2int_rn(lowest > 0.0f ? (lowest < 255.0f ? lowest : 255.0f) : 0.0f) - 128;
  } else {
    codes.scale = given.static_scale[0];
    codes.inverse = __fdiv_rn(1.0f, codes.scale);
    codes.zero = given.static_zero == nullptr ? 0 : given.static_zero[0];
  }
  if constexpr (kScaling != RowScaling::kSymmetric) {
    codes.least = static_cast<float>(-128 - codes.zero);
    codes.most = static_cast<float>(127 - codes.zero);
  }
  return codes;
}

// Less the zero point. NaN (0 · inf, where values are so small that the inverse overflows) counts
// as 0.
__device__ __forceinline__ int quantize_int(float value, const RowCodes& codes) {
  const float scaled = __fmul_rn(codes.finite ? value : 0.0f, codes.inverse);
  const float clamped = scaled > codes.most    ? codes.most
                        : scaled < codes.least ? codes.least
                                               : scaled;
  return __float2int_rn(clamped);
}

__device__ __forceinline__ unsigned quantize_byte(float value, const RowCodes& codes) {
  return static_cast<unsigned>(quantize_int(value, codes) + codes.zero) & 0xffu;
}

// Four of the values as bytes of a word.
__device__ __forceinline__ unsigned quantize_word(const float (&values)[16], int word,
                                                  const RowCodes& codes) {
  unsigned packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed |= quantize_byte(values[4 * word + i], codes) << (8 * i);
  return packed;
}

// Widens `bits`, as row_codes takes them, by those of the elements [first, end) of a row that this
// thread of kThreads sees; first is a multiple of 16. Bit patterns of magnitudes order like the
// magnitudes, with NaN above infinity: an integer maximum keeps NaN, which fmaxf would drop.
template <class T, int kThreads, int kSides>
__device__ __forceinline__ void widen_range(int thread, Global<const T> row, int64_t first,
                                            int64_t end, bool aligned, unsigned (&bits)[2]) {
  for (int64_t k = first + 16 * thread; k < end; k += 16 * kThreads) {
    float values[16];
    load_16_floats<T>(row + k, end - k, aligned, values);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const unsigned value = __float_as_uint(values[i]), magnitude = value & 0x7fffffffu;
      const bool low = kSides == 1 || value != magnitude;
      bits[0] = max(bits[0], low ? magnitude : 0u);
      if constexpr (kSides == 2) bits[1] = max(bits[1], low ? 0u : magnitude);
    }
  }
}

// The largest of all threads' bits, for all threads. `warp_bits`: kWarps * kSides, free again.
template <int kWarps, int kSides>
__device__ __forceinline__ void block_range(Shared<unsigned> warp_bits, unsigned (&bits)[2]) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    bits[side] = warp_max(bits[side]);
    if (thread % kWarpSize == 0) warp_bits[side * kWarps + thread / kWarpSize] = bits[side];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSides * kWarps; ++i) {
    const unsigned other = warp_bits[i];
    bits[i / kWarps] = max(bits[i / kWarps], other);
  }
  __syncthreads();  // the next row writes warp_bits again
}

// One block a row. The second reading of the row comes from L1 or L2.
template <class T, int kThreads, RowScaling kScaling>
__global__ void __launch_bounds__(kThreads, 8)
    quantize_rows(Global<const T> x, int64_t row_stride, bool aligned, int64_t M, int64_t K,
                  Global<int8_t> q, Global<float> x_scales, RowZeros given) {
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kSides = kScaling == RowScaling::kAsymmetric ? 2 : 1;
  COMPRESSOPS_SHARED_ARRAY(unsigned, warp_bits, kWarps* kSides);
  const int64_t padded_k = padded_to_16(K);
  const int thread = static_cast<int>(threadIdx.x);
  let_next_kernel_begin();

  for (int64_t row = blockIdx.x; row < M; row += gridDim.x) {
    unsigned bits[2] = {0, 0};
    widen_range<T, kThreads, kSides>(thread, x + row * row_stride, 0, K, aligned, bits);
    block_range<kWarps, kSides>(warp_bits, bits);
    const RowCodes codes = row_codes<kScaling>(bits[0], bits[1], given);
    if (thread == 0) {
      x_scales[row] = codes.scale;
      if constexpr (kScaling != RowScaling::kSymmetric) given.zeros[row] = codes.zero;
    }
    for (int64_t k = int64_t{16} * thread; k < padded_k; k += 16 * kThreads) {
      float values[16];
      load_16_floats<T>(x + (row * row_stride + k), K - k, aligned, values);
      unsigned packed[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) packed[word] = quantize_word(values, word, codes);
      view_as<int4>(q + (row * padded_k + k))[0] =
          make_int4(static_cast<int>(packed[0]), static_cast<int>(packed[1]),
                    static_cast<int>(packed[2]), static_cast<int>(packed[3]));
    }
  }
}

constexpr int kQuantizeThreads = 128;

// Quantizes x[M, K], whose rows are row_stride elements apart, into q[M, padded_to_16(K)] and
// x_scales[M]. `max_blocks` bounds the grid.
template <class T, RowScaling kScaling = RowScaling::kSymmetric>
cudaError_t launch_quantize_rows(Global<const T> x, int64_t row_stride, int64_t M, int64_t K,
                                 Global<int8_t> q, Global<float> x_scales, cudaStream_t stream,
                                 int64_t max_blocks = 0x7fffffff, const RowZeros& given = {}) {
  if (M == 0) return cudaSuccess;
  const bool aligned = misalignment(x, 16) == 0 && row_stride * int64_t{sizeof(T)} % 16 == 0;
  return launch(quantize_rows<T, kQuantizeThreads, kScaling>,
                dim3(static_cast<unsigned>(M < max_blocks ? M : max_blocks)),
                dim3(kQuantizeThreads), 0, stream, x, row_stride, aligned, M, K, q, x_scales,
                given);
}

// The same, with a scaling that is known when it runs.
template <class T>
cudaError_t launch_quantize_rows(RowScaling scaling, Global<const T> x, int64_t row_stride,
                                 int64_t M, int64_t K, Global<int8_t> q, Global<float> x_scales,
                                 cudaStream_t stream, const RowZeros& given) {
  const auto quantize =
      scaling == RowScaling::kSymmetric    ? launch_quantize_rows<T, RowScaling::kSymmetric>
      : scaling == RowScaling::kAsymmetric ? launch_quantize_rows<T, RowScaling::kAsymmetric>
                                           : launch_quantize_rows<T, RowScaling::kStatic>;
  return quantize(x, row_stride, M, K, q, x_scales, stream, 0x7fffffff, given);
}

}  // namespace compressops
