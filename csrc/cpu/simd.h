// What kernels are written with over vectors of kLanes floats: loads and stores of three element
// types, a transposition. Included once by each of simd_baseline.h, simd_avx2.h and simd_avx512.h,
// which define
//   kLanes                  floats in a vector
//   Vec, Short              vectors of kLanes float and uint16_t
//   widen, narrow           float16 bits (Short) to Vec and back
//   load_first, store_first the first `count` floats of a vector; the others load as 0
// The vectors are those of GCC and Clang: the compiler's target decides the instructions.

typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

template <int... I>
struct Indices {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
  using type = Indices<I...>;
};

inline Vec load(const float* from) { return *(const VecUnaligned*)from; }
inline void store(float* to, Vec value) { *(VecUnaligned*)to = value; }

inline Vec bfloat_to_float(Short bits) { return (Vec)(__builtin_convertvector(bits, Bits) << 16); }

// To the nearest, ties to even. A NaN stays one, where the addition could carry it to Inf.
inline Short float_to_bfloat(Vec value) {
  const Bits raw = (Bits)value;
  const Bits rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  const Bits nan = (Bits)(value != value);
  return __builtin_convertvector((rounded & ~nan) | (((raw >> 16) | 0x40) & nan), Short);
}

// Elements: kLanes side by side to a vector and back.
struct Float {
  typedef float Storage;
  static Vec get(const float* from) { return load(from); }
  static void put(float* to, Vec value) { store(to, value); }
  static Vec get_first(const float* from, int64_t count) { return load_first(from, count); }
  static void put_first(float* to, int64_t count, Vec value) { store_first(to, count, value); }
};
struct Short16 {
  typedef uint16_t Storage;
  static Short get_bits(const uint16_t* from, int64_t count) {
    Short bits = {};
    memcpy(&bits, from, count * sizeof(uint16_t));
    return bits;
  }
  static void put_bits(uint16_t* to, int64_t count, Short bits) {
    memcpy(to, &bits, count * sizeof(uint16_t));
  }
};
struct Half : Short16 {
  static Vec get(const uint16_t* from) { return widen(get_bits(from, kLanes)); }
  static void put(uint16_t* to, Vec value) { put_bits(to, kLanes, narrow(value)); }
  static Vec get_first(const uint16_t* from, int64_t count) { return widen(get_bits(from, count)); }
  static void put_first(uint16_t* to, int64_t count, Vec value) {
    put_bits(to, count, narrow(value));
  }
};
struct BFloat16 : Short16 {
  static Vec get(const uint16_t* from) { return bfloat_to_float(get_bits(from, kLanes)); }
  static void put(uint16_t* to, Vec value) { put_bits(to, kLanes, float_to_bfloat(value)); }
  static Vec get_first(const uint16_t* from, int64_t count) {
    return bfloat_to_float(get_bits(from, count));
  }
  static void put_first(uint16_t* to, int64_t count, Vec value) {
    put_bits(to, count, float_to_bfloat(value));
  }
};

// log2(kLanes) riffles, each of the first half of the rows with the second, transpose a matrix.
template <int... I>
inline void riffle(const Vec* from, Vec* to, Indices<I...>) {
  constexpr int kHalf = kLanes / 2;
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    to[2 * i] =
        __builtin_shufflevector(from[i], from[i + kHalf], (I % 2 ? I / 2 + kLanes : I / 2)...);
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + kHalf],
                                            (I % 2 ? I / 2 + kLanes + kHalf : I / 2 + kHalf)...);
  }
}

inline void transpose(Vec* rows) {
  using All = typename UpTo<kLanes>::type;
  Vec other[kLanes];
  riffle(rows, other, All());
  riffle(other, rows, All());
  if constexpr (kLanes >= 8) riffle(rows, other, All());
  if constexpr (kLanes >= 16) riffle(other, rows, All());
  if constexpr (kLanes == 8)
    for (int i = 0; i < kLanes; ++i) rows[i] = other[i];
}
