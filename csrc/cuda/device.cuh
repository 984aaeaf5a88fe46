// What every kernel header needs besides CUDA itself. Free of torch.
//
// The same headers are compiled by nvcc for a GPU and by g++ for tests/cuda_on_cpu, which runs them
// on a CPU and checks them. Kernels therefore reach memory through Global<T> and Shared<T>: plain
// pointers here, bounds- and race-checked accessors there.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>

namespace compressops {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

// A static array in shared memory, at function scope.
#define COMPRESSOPS_SHARED_ARRAY(T, name, count)                            \
  __shared__ __align__(16) unsigned char name##_bytes[(count) * sizeof(T)]; \
  const ::compressops::Shared<T> name = reinterpret_cast<T*>(name##_bytes)

// The launch's dynamic shared memory, seen as an array of T. `bytes` is what the kernel may use of
// it: the checker holds it against what the launch gave.
#define COMPRESSOPS_DYNAMIC_SHARED(T, name, bytes)                            \
  extern __shared__ __align__(16) unsigned char compressops_dynamic_shared[]; \
  const ::compressops::Shared<T> name = reinterpret_cast<T*>(compressops_dynamic_shared)

// The part [offset, offset + count) of an array; the count is for the checker.
template <class T>
__host__ __device__ __forceinline__ T* slice(T* array, int64_t offset, int64_t /*count*/) {
  return array + offset;
}

// The same memory as elements of another type; aligned access is the caller's duty.
template <class To, class From>
__host__ __device__ __forceinline__ To* view_as(From* array) {
  return reinterpret_cast<To*>(array);
}

template <class T>
__host__ __device__ __forceinline__ int misalignment(T* array, int bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(array) % static_cast<uintptr_t>(bytes));
}

// Shared memory that every launch may use without asking the driver first.
constexpr size_t kSharedBytesWithoutOptIn = 48 * 1024;

template <class... Params>
cudaError_t allow_shared_bytes(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= kSharedBytesWithoutOptIn) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
  return cudaGetLastError();
}

// The same on compute capability 9.0 and more, of a kernel whose blocks may begin while the kernel
// before it on the stream still runs. It calls wait_for_kernel_before ahead of what that one
// writes; let_next_kernel_begin there says from when on.
template <class... Params, class... Args>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                         cudaStream_t stream, Args... args) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace compressops

#else  // a CPU pretends to be the GPU

#include "cuda_on_cpu.h"

#endif

namespace compressops {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// From the lowest bits of a word.
template <class T>
__device__ __forceinline__ float float_from_bits(unsigned bits);
template <>
__device__ __forceinline__ float float_from_bits<float>(unsigned bits) {
  return __uint_as_float(bits);
}
template <>
__device__ __forceinline__ float float_from_bits<__half>(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
template <>
__device__ __forceinline__ float float_from_bits<__nv_bfloat16>(unsigned bits) {
  return __uint_as_float(bits << 16);
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ void as_floats(int4 chunk, float (&values)[4]) {
  values[0] = __uint_as_float(static_cast<unsigned>(chunk.x));
  values[1] = __uint_as_float(static_cast<unsigned>(chunk.y));
  values[2] = __uint_as_float(static_cast<unsigned>(chunk.z));
  values[3] = __uint_as_float(static_cast<unsigned>(chunk.w));
}

// Elements side by side in a word of 4 bytes: two of 16 bits, or one float.
template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ float word_element(uint32_t word, int i) {
  return float_from_bits<T>(word >> (32 / kPerWord<T> * i));
}

template <class T>
__device__ __forceinline__ uint32_t pack_word(const float (&values)[kPerWord<T>]);
template <>
__device__ __forceinline__ uint32_t pack_word<float>(const float (&values)[1]) {
  return __float_as_uint(values[0]);
}
template <>
__device__ __forceinline__ uint32_t pack_word<__half>(const float (&values)[2]) {
  const __half2 pair = __floats2half2_rn(values[0], values[1]);
  return static_cast<uint32_t>(__half_as_ushort(pair.x)) |
         static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}
template <>
__device__ __forceinline__ uint32_t pack_word<__nv_bfloat16>(const float (&values)[2]) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}

}  // namespace compressops
