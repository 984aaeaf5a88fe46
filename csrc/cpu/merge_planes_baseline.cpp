#include <string.h>

#include "merge_planes.h"

namespace compressops::cpu {
namespace {

// In the vectors of GCC and Clang, which become what the processor has at the least.
struct Vec {
  static constexpr int64_t kBytes = 16;
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  Bytes v;

  static Vec load(const uint8_t* at) {
    Vec x;
    memcpy(&x.v, at, sizeof(x.v));
    return x;
  }
  void store(void* at) const { memcpy(at, &v, sizeof(v)); }
  void stream(void* at) const { store(at); }  // no instruction for it that all processors have
  static void stream_end() {}
  Vec spread_by_two() const { return *this; }
  Vec spread_by_four() const { return *this; }
  static Vec lo8(Vec a, Vec b) {
    return {
        __builtin_shufflevector(a.v, b.v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)};
  }
  static Vec hi8(Vec a, Vec b) {
    return {__builtin_shufflevector(a.v, b.v, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                    15, 31)};
  }
  static Vec lo16(Vec a, Vec b) {
    return {(Bytes)__builtin_shufflevector((Pairs)a.v, (Pairs)b.v, 0, 8, 1, 9, 2, 10, 3, 11)};
  }
  static Vec hi16(Vec a, Vec b) {
    return {(Bytes)__builtin_shufflevector((Pairs)a.v, (Pairs)b.v, 4, 12, 5, 13, 6, 14, 7, 15)};
  }
  Vec turn_back16() const { return {(Bytes)((Pairs)v >> 1 | (Pairs)v << 15)}; }
  Vec turn_back32() const { return {(Bytes)((Words)v >> 1 | (Words)v << 31)}; }
};

#include "merge_planes_loops.h"

}  // namespace

const MergePlanesKernels& merge_planes_baseline() {
  static const MergePlanesKernels kernels = {two, four};
  return kernels;
}

}  // namespace compressops::cpu
