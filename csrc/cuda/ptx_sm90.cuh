// Hopper's instructions: barriers in shared memory that count bytes, copies by TMA, products of a
// warpgroup (wgmma). As ptx.cuh is for the other architectures' PTX: each behind a named function;
// what stands for them on a CPU is tests/cuda_on_cpu/hopper.h. Formats are those of the PTX ISA,
// "mbarrier", "cp.async.bulk.tensor" and "Asynchronous warpgroup level matrix instructions".
#pragma once

#include "device.cuh"
#include "ptx.cuh"
#include "tensor_map.cuh"

#ifdef __CUDACC__

namespace compressops {

// Whether the library has code for sm_90a; setup.py says so.
#ifdef COMPRESSOPS_SM90A
constexpr bool kBuiltForSm90a = true;
#else
constexpr bool kBuiltForSm90a = false;
#endif

// Only code for sm_90a itself has them; kernels are empty elsewhere.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// Dynamic shared memory that TMA writes swizzled: the pattern repeats every 1024 bytes.
#define COMPRESSOPS_TMA_SHARED(T, name, bytes)                              \
  extern __shared__ __align__(1024) unsigned char compressops_tma_shared[]; \
  const ::compressops::Shared<T> name = reinterpret_cast<T*>(compressops_tma_shared)

__device__ __forceinline__ void mbarrier_init(Shared<uint64_t> barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes barriers that this thread initialized known to TMA; a __syncthreads follows.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async.shared::cta;\n" ::
          : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Shared<uint64_t> barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase wait for so many bytes of copies as well.
__device__ __forceinline__ void mbarrier_arrive_expect(Shared<uint64_t> barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of this parity; phases are 0, 1, 0 …, and the one before the first
// counts as ended.
__device__ __forceinline__ void mbarrier_wait(Shared<uint64_t> barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies the map's box that begins at (row, column); its bytes count for the barrier's phase.
template <class T>
__device__ __forceinline__ void tma_load(Shared<T> target, const TensorMap& map, int64_t row,
                                         int64_t column, Shared<uint64_t> barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(shared_address(target)),
      "l"(&map), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)),
      "r"(shared_address(barrier))
      : "memory");
}

// An operand of wgmma in shared memory: rows of 128 bytes, swizzled in groups of eight rows, from a
// column that is a multiple of 32 bytes on.
using WgmmaOperand = uint64_t;
template <class T>
__device__ __forceinline__ WgmmaOperand wgmma_operand(Shared<T> rows, int column_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroupBytes = 1024;
  const uint64_t address = shared_address(rows) + static_cast<unsigned>(column_bytes);
  return kSwizzle128 | kGroupBytes >> 4 << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// Before a wgmma that reads registers which the thread wrote.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending of the warpgroup's groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Registers of every thread of a warpgroup: gives some back, or asks for more and waits for them.
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Operands of asm: 10t to 10t + 9, and the registers that they are.
#define COMPRESSOPS_TEN(t)                                                                         \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define COMPRESSOPS_60 \
  COMPRESSOPS_TEN()    \
  COMPRESSOPS_TEN(1) COMPRESSOPS_TEN(2) COMPRESSOPS_TEN(3) COMPRESSOPS_TEN(4) COMPRESSOPS_TEN(5)
#define COMPRESSOPS_64 COMPRESSOPS_60 "%60, %61, %62, %63"
#define COMPRESSOPS_128                                                                      \
  COMPRESSOPS_60 COMPRESSOPS_TEN(6) COMPRESSOPS_TEN(7) COMPRESSOPS_TEN(8) COMPRESSOPS_TEN(9) \
      COMPRESSOPS_TEN(10) COMPRESSOPS_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define COMPRESSOPS_C8(type, c, i)                                                                \
  "+" type(c[i]), "+" type(c[i + 1]), "+" type(c[i + 2]), "+" type(c[i + 3]), "+" type(c[i + 4]), \
      "+" type(c[i + 5]), "+" type(c[i + 6]), "+" type(c[i + 7])
#define COMPRESSOPS_C64(type, c, i)                                                            \
  COMPRESSOPS_C8(type, c, i), COMPRESSOPS_C8(type, c, i + 8), COMPRESSOPS_C8(type, c, i + 16), \
      COMPRESSOPS_C8(type, c, i + 24), COMPRESSOPS_C8(type, c, i + 32),                        \
      COMPRESSOPS_C8(type, c, i + 40), COMPRESSOPS_C8(type, c, i + 48),                        \
      COMPRESSOPS_C8(type, c, i + 56)

// c[64, 2 kSums] += a[64, 32] @ b[2 kSums, 32].T in int8 with exact int32 sums, by four warps.
// c[4j + 2h + i] is row 16 (warp % 4) + 8h + lane / 4, column 8j + 2 (lane % 4) + i.
template <int kSums>
__device__ __forceinline__ void wgmma_s8(int (&c)[kSums], WgmmaOperand a, WgmmaOperand b) {
  static_assert(kSums == 64 || kSums == 128);
  if constexpr (kSums == 64) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" COMPRESSOPS_64
        "}, %64, %65, add;\n}\n"
        : COMPRESSOPS_C64("r", c, 0)
        : "l"(a), "l"(b));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" COMPRESSOPS_128
        "}, %128, %129, add;\n}\n"
        : COMPRESSOPS_C64("r", c, 0), COMPRESSOPS_C64("r", c, 64)
        : "l"(a), "l"(b));
  }
}

// c[64, 128] = a[64, 16] @ b[128, 16].T in float16 or bfloat16, + c if `add`, with float32 sums, by
// four warps; c as of wgmma_s8. a[2h' + h] has row 16 (warp % 4) + 8h + lane / 4, columns 2 (lane %
// 4) + 8h' and the next; until the product is waited for, nobody writes it.
template <class T>
__device__ __forceinline__ void wgmma_f32(float (&c)[64], const uint32_t (&a)[4], WgmmaOperand b,
                                          bool add);
#define COMPRESSOPS_WGMMA_F32(T, type)                                                     \
  template <>                                                                              \
  __device__ __forceinline__ void wgmma_f32<T>(float (&c)[64], const uint32_t (&a)[4],     \
                                               WgmmaOperand b, bool add) {                 \
    asm volatile(                                                                          \
        "{\n.reg .pred add;\nsetp.ne.s32 add, %69, 0;\n"                                   \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" COMPRESSOPS_64   \
        "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}\n"                                 \
        : COMPRESSOPS_C64("f", c, 0)                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add))); \
  }
COMPRESSOPS_WGMMA_F32(__half, "f16")
COMPRESSOPS_WGMMA_F32(__nv_bfloat16, "bf16")

}  // namespace compressops

#endif
