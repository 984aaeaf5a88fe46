// The only place with inline PTX: each instruction behind a named function, with a host equivalent
// that tests/cuda_on_cpu runs. Fragment layouts are those of the PTX ISA, "Matrix fragments for
// mma.m16n8k32", "... mma.m16n8k16" and "ldmatrix".
#pragma once

#include "device.cuh"

namespace compressops {

// Reads through the non-coherent (texture) path: nobody may write the address during the launch.
template <class T>
__device__ __forceinline__ T load_nc(Global<const T> array, int64_t index) {
  return __ldg(array + index);
}

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// blockIdx.x, read anew: what is computed from it need not stay in registers from an earlier use.
__device__ __forceinline__ unsigned block_index_x() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(index));
  return index;
}

// Of launch_early, in device.cuh; nothing where the architecture has no such thing.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Starts a copy of 16 bytes to shared memory past the registers and L1; zeros if not `valid`, and
// then `source` is not read.
__device__ __forceinline__ void cp_async_16(Shared<int4> target, Global<const int4> source,
                                            bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(target)),
               "l"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 16-byte matrices. Lane 8i + r gives the address of row r of matrix i; every lane gets
// bytes [4 (lane % 4), + 4) of row lane / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], Shared<int4> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of matrices of 8 x 8 elements of 16 bits, each transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], Shared<int4> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16, 8] += a[16, 32] @ b[8, 32].T in int8 with exact int32 sums.
__device__ __forceinline__ void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16, 8] += a[16, 16] @ b[8, 16].T in int8 with exact int32 sums.
__device__ __forceinline__ void mma_m16n8k16_s8(int (&c)[4], uint32_t a_low, uint32_t a_high,
                                                uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a_low), "r"(a_high), "r"(b));
}

// (word & kAnd) | kOr in one instruction; of two constants the compiler makes two.
template <uint32_t kAnd, uint32_t kOr>
__device__ __forceinline__ uint32_t and_or(uint32_t word) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(result) : "r"(word), "n"(kAnd), "n"(kOr));
  return result;
}

// The sums of both numbers of two words.
template <class T>
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t add_pair<__half>(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.f16x2 %0, %1, %2;\n" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
template <>
__device__ __forceinline__ uint32_t add_pair<__nv_bfloat16>(uint32_t a, uint32_t b) {
  // a · 1 + b: sm_80 has no addition of bfloat16.
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
}

// The same number, of which the compiler does not know how it came about: it can neither keep parts
// of it in registers nor compute it once more.
__device__ __forceinline__ int64_t opaque(int64_t number) {
  asm volatile("" : "+l"(number));
  return number;
}
__device__ __forceinline__ int opaque(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Reads from L2: what another block wrote during the launch.
template <class T>
__device__ __forceinline__ T load_cg(Global<const T> array, int64_t index) {
  return __ldcg(array + index);
}

// c[16, 8] += a[16, 16] @ b[8, 16].T in float16 or bfloat16 with float32 sums.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline unsigned block_index_x() { return blockIdx.x; }

// Kernels run one after the other.
inline void let_next_kernel_begin() {}
inline void wait_for_kernel_before() {}

inline void cp_async_16(Shared<int4> target, Global<const int4> source, bool valid) {
  cuda_on_cpu::start_copy(target, source, valid);
}

inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }

template <int kPending>
void cp_async_wait() {
  cuda_on_cpu::wait_copies(kPending);
}

inline void ldmatrix_x4(uint32_t (&fragment)[4], Shared<int4> row) {
  const auto rows = cuda_on_cpu::exchange(kFullWarp, row, "ldmatrix");
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    fragment[i] = view_as<uint32_t>(rows[8 * i + lane / 4])[lane % 4];
  }
}

inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], Shared<int4> row) {
  const auto rows = cuda_on_cpu::exchange(kFullWarp, row, "ldmatrix");
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int of_row) {
      return uint32_t{view_as<uint16_t>(rows[8 * i + of_row])[lane / 4]};
    };
    fragment[i] = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
  }
}

struct Fragments {
  uint32_t a[4], b[2];
};

inline void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = cuda_on_cpu::exchange(kFullWarp, mine, "mma");
  const int group = cuda_on_cpu::lane() / 4, in_group = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    // c[i] is row group + 8 (i / 2), column 2 in_group + i % 2.
    const int row_half = i / 2, column = 2 * in_group + i % 2;
    for (int quad = 0; quad < 4; ++quad) {
      const Fragments& left = all[4 * group + quad];
      const Fragments& right = all[4 * column + quad];
      for (int k_half = 0; k_half < 2; ++k_half) {
        c[i] = __dp4a(static_cast<int>(left.a[row_half + 2 * k_half]),
                      static_cast<int>(right.b[k_half]), c[i]);
      }
    }
  }
}

inline void mma_m16n8k16_s8(int (&c)[4], uint32_t a_low, uint32_t a_high, uint32_t b) {
  // The second halves of the fragments of 32 inputs are zero.
  mma_m16n8k32_s8(c, {a_low, a_high, 0, 0}, {b, 0});
}

template <uint32_t kAnd, uint32_t kOr>
uint32_t and_or(uint32_t word) {
  return (word & kAnd) | kOr;
}

template <class T>
uint32_t add_pair(uint32_t a, uint32_t b) {
  return pack_word<T>({word_element<T>(a, 0) + word_element<T>(b, 0),
                       word_element<T>(a, 1) + word_element<T>(b, 1)});
}

inline int64_t opaque(int64_t number) { return number; }
inline int opaque(int number) { return number; }

template <class T>
T load_cg(Global<const T> array, int64_t index) {
  return array[index];
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = cuda_on_cpu::exchange(kFullWarp, mine, "mma");
  const int group = cuda_on_cpu::lane() / 4, in_group = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    // c[i] is row group + 8 (i / 2), column 2 in_group + i % 2.
    const int row_half = i / 2, column = 2 * in_group + i % 2;
    for (int quad = 0; quad < 4; ++quad) {
      const Fragments& left = all[4 * group + quad];
      const Fragments& right = all[4 * column + quad];
      for (int k_half = 0; k_half < 2; ++k_half) {
        const uint32_t l = left.a[row_half + 2 * k_half], r = right.b[k_half];
        c[i] += float_from_bits<T>(l & 0xffffu) * float_from_bits<T>(r & 0xffffu);
        c[i] += float_from_bits<T>(l >> 16) * float_from_bits<T>(r >> 16);
      }
    }
  }
}

#endif

}  // namespace compressops
