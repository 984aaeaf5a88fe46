// What bsr_int8_linear's kernels add to bsr_linear_simd.h: sums of integers to floats. Included as
// that is.

typedef int32_t Int __attribute__((vector_size(kLanes * 4)));

void scale(float* sums, int64_t rows, int64_t columns, const BsrScales& how) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t count = columns - column < kLanes ? columns - column : kLanes;
    const Vec scales = load_first(how.scales + column, count);
    const Bits weight_sums = (Bits)load_first((const float*)how.weight_sums + column, count);
    for (int64_t m = 0; m < rows; ++m) {
      float* at = sums + m * kStrip + column;
      // Unsigned: the zero point may carry a sum past 2^31, and taking it off undoes that.
      const Bits exact = (Bits)load(at) - weight_sums * (uint32_t)how.rows[m].zero;
      store(at, __builtin_convertvector((Int)exact, Vec) * (how.rows[m].scale * scales));
    }
  }
}
