// CUDA's types and device functions as far as the kernels use them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "checked_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  // float32's exponents begin 112 lower; the product is exact, of subnormal numbers too.
  float result = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude > 0x7c00) result = std::numeric_limits<float>::quiet_NaN();
  if (magnitude == 0x7c00) result = std::numeric_limits<float>::infinity();
  return std::bit_cast<float>(std::bit_cast<uint32_t>(result) | sign);
}
inline __half __float2half_rn(float value) {
  const auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16 & 0x8000);
  if (std::isnan(value)) return {0x7fff};
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  uint32_t units = 0;
  if (magnitude < 0x1p-14f) {  // subnormal: the last place is 2^-24, as that of numbers from 1/2 on
    units = std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {  // halves to even; what rounds up to the next power of two carries into the exponent
    const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
    units = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
  }
  return {static_cast<uint16_t>(sign | units)};
}

struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  const double clamped = std::clamp(static_cast<double>(value), -2147483648.0, 2147483647.0);
  return static_cast<int>(std::nearbyint(clamped));
}
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) {
    c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  }
  return c;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned select = selector >> (4 * i) & 15;
    unsigned byte = bytes >> (8 * (select & 7)) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __ffs(int value) {
  return value ? std::countr_zero(static_cast<unsigned>(value)) + 1 : 0;
}
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (value >> i & 1) << (31 - i);
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
// Blocks run one after the other, so that all of them see what was written.
inline void __threadfence() {}
template <class T>
T __ldg(compressops::Global<const T> address) {
  return *address;
}
using std::max;
using std::min;

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int mine = cuda_on_cpu::lane();
  const auto values = cuda_on_cpu::exchange(mask, value, "__shfl_sync");
  return values[mine / width * width + (source & (width - 1))];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int mine = cuda_on_cpu::lane(), source = mine ^ lanes;
  const auto values = cuda_on_cpu::exchange(mask, value, "__shfl_xor_sync");
  return source / width > mine / width ? value : values[source];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int mine = cuda_on_cpu::lane();
  const auto values = cuda_on_cpu::exchange(mask, value, "__shfl_up_sync");
  const int source = mine - static_cast<int>(lanes);
  return source < mine / width * width ? value : values[source];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int mine = cuda_on_cpu::lane();
  const auto values = cuda_on_cpu::exchange(mask, value, "__shfl_down_sync");
  const int source = mine + static_cast<int>(lanes);
  return source >= (mine / width + 1) * width ? value : values[source];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto votes = cuda_on_cpu::exchange(mask, predicate != 0, "__ballot_sync");
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    if (votes.mask() >> i & 1) result |= static_cast<unsigned>(votes[i]) << i;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
// On a GPU the lanes that happen to run together: nothing may depend on more than the caller.
inline unsigned __activemask() { return 1u << cuda_on_cpu::lane(); }

namespace cuda_on_cpu {

template <class T, class Change>
T read_modify_write(compressops::Shared<T> address, Change change) {
  const int64_t at = address.checked(0);
  if (address.region()->shadow[at].writer < 0) {
    fail("atomic on shared array \"", address.region()->name, "\", byte ", at, ", never written");
  }
  address.region()->record_write(at, sizeof(T), /*atomic=*/true);
  T old;
  std::memcpy(&old, address.region()->bytes + at, sizeof(T));
  const T now = change(old);
  std::memcpy(address.region()->bytes + at, &now, sizeof(T));
  return old;
}
template <class T, class Change>
T read_modify_write(compressops::Global<T> address, Change change) {
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, expression)                                                \
  template <template <class> class Pointer, class T>                                        \
  T name(Pointer<T> address, std::type_identity_t<T> value) {                               \
    return cuda_on_cpu::read_modify_write(address, [=](T old) -> T { return expression; }); \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicMax, std::max(old, value))
CUDA_ON_CPU_ATOMIC(atomicMin, std::min(old, value))
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef CUDA_ON_CPU_ATOMIC
template <template <class> class Pointer, class T>
T atomicCAS(Pointer<T> address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return cuda_on_cpu::read_modify_write(address,
                                        [=](T old) { return old == compare ? value : old; });
}
