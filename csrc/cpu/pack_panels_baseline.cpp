#include <string.h>

#include "pack_panels.h"

namespace compressops::cpu {
namespace {

// In the vectors of GCC and Clang, which become what the processor has at the least.
struct Vec {
  static constexpr int kWords = 4;
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef int32_t Signed __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint64_t Pairs __attribute__((vector_size(16)));
  Words v;

  static Vec load(const int8_t* at) {
    Vec x;
    memcpy(&x.v, at, sizeof(x.v));
    return x;
  }
  static Vec bytes(uint8_t value) { return {(Words)((Bytes){} + value)}; }
  void store(void* at) const { memcpy(at, &v, sizeof(v)); }
  Vec operator|(Vec other) const { return {v | other.v}; }
  Vec operator&(Vec other) const { return {v & other.v}; }
  Vec plus_bytes(Vec other) const { return {(Words)((Bytes)v + (Bytes)other.v)}; }
  Vec shifted_right64(int bits) const { return {(Words)((Pairs)v >> bits)}; }
  static Vec even_words(Vec a, Vec b) { return {__builtin_shufflevector(a.v, b.v, 0, 2, 4, 6)}; }
  static Vec lo32(Vec a, Vec b) { return {__builtin_shufflevector(a.v, b.v, 0, 4, 1, 5)}; }
  static Vec hi32(Vec a, Vec b) { return {__builtin_shufflevector(a.v, b.v, 2, 6, 3, 7)}; }
  static Vec lo64(Vec a, Vec b) { return {__builtin_shufflevector(a.v, b.v, 0, 1, 4, 5)}; }
  static Vec hi64(Vec a, Vec b) { return {__builtin_shufflevector(a.v, b.v, 2, 3, 6, 7)}; }
  static void lanes(const Vec* in, Vec* out) { out[0] = in[0]; }
  Vec sum_bytes(Vec words) const {
    Signed sum = (Signed)v;
    for (int shift = 24; shift >= 0; shift -= 8) sum += (Signed)(words.v << shift) >> 24;
    return {(Words)sum};
  }
};

#include "pack_panels_loops.h"

}  // namespace

const PackPanelsKernels& pack_panels_baseline() { return kKernels; }

}  // namespace compressops::cpu
