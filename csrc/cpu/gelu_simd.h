// The body of the GELU kernels, written once over vectors of kLanes floats. Included by one
// translation unit per instruction set, inside its anonymous namespace, after it has defined
// kLanes. The vectors are those of GCC and Clang: the compiler's target decides the instructions.
//
// Φ(y) = 1/2 + y · P(y²) / Q(y²), both of degree 5: a minimax fit to erf(y / √2) / 2 over |y|
// <= 5.6, within 1e-8. All coefficients are positive, so that nothing cancels but 1/2 for negative
// y, as it does in 1 + erf. That is 18 operations a vector, of which one is a division; with exp,
// which keeps the negative tail to its last bits, it is 45, and the fused op no faster than torch's
// GELU after it.

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr float kNumerator[] = {0.398942232f,    0.0343761444f,  0.00470726099f,
                                0.000173850902f, 6.35651395e-6f, 2.2145187e-8f};
constexpr float kDenominator[] = {1.0f,           0.252833933f,  0.0289401077f,
                                  0.00191297976f, 7.5101867e-5f, 1.18020682e-6f};

inline Vec polynomial(const float (&coefficients)[6], Vec x) {
  Vec sum = Vec{} + coefficients[5];
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

inline Vec gelu_of(Vec y) {
  const Vec square = y * y;
  const Vec half = y * polynomial(kNumerator, square) / polynomial(kDenominator, square);
  // Beyond, Φ is 0 or 1 to the precision of this (and ∞ / ∞ is neither).
  const Vec end = y > Vec{} ? Vec{} + 1.0f : Vec{};
  const Vec phi = square > Vec{} + 31.36f ? end : 0.5f + half;
  return y * phi;
}

inline void gelu_in_place(float* values, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    VecUnaligned* at = (VecUnaligned*)(values + i);
    *at = gelu_of(*at);
  }
  if (i == count) return;
  float rest[kLanes] = {};
  __builtin_memcpy(rest, values + i, (count - i) * sizeof(float));
  VecUnaligned* at = (VecUnaligned*)rest;
  *at = gelu_of(*at);
  __builtin_memcpy(values + i, rest, (count - i) * sizeof(float));
}
