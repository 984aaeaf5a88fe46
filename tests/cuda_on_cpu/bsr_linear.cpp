// Runs the CUDA kernels of bsr_linear, its gradients and bsr_int8_linear on buffers of a Python
// test.
#include <cmath>

#include "bsr_grad_values.cuh"
#include "bsr_run.h"
#include "pack_rows.cuh"
#include "quantize_rows.cuh"

namespace {

template <class T>
Global<const T> rows_of(const Buffers& b) {
  const int64_t count = b.M ? (b.M - 1) * b.x_row_stride + b.K : 0;
  return Global<const T>(static_cast<const T*>(b.x), count, "x");
}

// Rows on 16 bytes: x as it is, or a copy.
template <class T>
struct Rows {
  Rows(Global<const T> x, int64_t x_stride, int64_t M, int64_t K)
      : data(x), stride(x_stride), columns(K), copy(M * ceil_div(K, kPiece) * kPiece, "padded x") {
    if (K % kPiece == 0 && stride % kPiece == 0 && misalignment(x, 16) == 0) return;
    stride = columns = ceil_div(K, kPiece) * kPiece;
    launch_pack_rows<T, T>(x, x_stride, M, K, columns, copy.array(), kMultiprocessors, nullptr);
    data = copy.array();
  }
  static constexpr int64_t kPiece = 16 / sizeof(T);
  Global<const T> data;
  int64_t stride, columns;
  Scratch<T> copy;
};

template <class T>
cudaError_t run_float(const Buffers& b, bool transposed) {
  BsrArgs<T> args;
  const Rows<T> rows(rows_of<T>(b), b.x_row_stride, b.M, b.K);
  args.x = rows.data;
  args.x_row_stride = rows.stride;
  args.x_columns = rows.columns;
  return transposed ? run<T, true>(b, args) : run<T, false>(b, args);
}

// b's x is grad, and its K is N.
template <class T>
cudaError_t run_grad_values(const Buffers& b, const void* x, int64_t K) {
  const Rows<T> left(rows_of<T>(b), b.x_row_stride, b.M, b.K);
  const Rows<T> right(Global<const T>(static_cast<const T*>(x), b.M * K, "x"), K, b.M, K);
  BsrGradValuesArgs<T> args;
  args.M = b.M, args.N = b.K, args.K = K;
  args.grad = left.data, args.x = right.data;
  args.grad_stride = left.stride, args.x_stride = right.stride;
  args.grad_columns = left.columns, args.x_columns = right.columns;
  args.nnz = b.nnz, args.r = b.r, args.c = b.c;
  args.rows = ceil_div(b.K, b.r);
  args.crow = Global<const int>(b.crow, args.rows + 1, "crow_indices");
  args.columns = Global<const int>(b.columns, b.nnz, "col_indices");
  args.result = Global<float>(static_cast<float*>(b.y), b.nnz * b.r * b.c, "result");
  return launch_bsr_grad_values(args, nullptr);
}

#ifndef CUDA_ON_CPU_BF16_ONLY
template <class T>
cudaError_t run_int8(const Buffers& b) {
  const int64_t padded = padded_to_16(b.K);
  const Scratch<int8_t> q(b.M * padded, "q");
  const Scratch<float> x_scales(b.M, "x_scales");
  const Scratch<int> x_zeros(b.M, "x_zeros");
  BsrArgs<int8_t> args;
  RowZeros given;
  if (b.x_scale) given.static_scale = Global<const float>(b.x_scale, 1, "x_scale");
  if (b.x_zero) given.static_zero = Global<const int8_t>(b.x_zero, 1, "x_zero");
  const auto scaling = static_cast<RowScaling>(b.scaling);
  if (scaling != RowScaling::kSymmetric) given.zeros = x_zeros.array();
  args.x_zeros = given.zeros;
  launch_quantize_rows<T>(scaling, rows_of<T>(b), b.x_row_stride, b.M, b.K, q.array(),
                          x_scales.array(), nullptr, given);
  args.x = q.array();
  args.x_row_stride = args.x_columns = padded;
  args.x_scales = x_scales.array();
  args.scales = Global<const float>(b.scales, b.N, "weight_scales");
  args.weight_sums = Global<const int>(b.weight_sums, b.N, "weight_sums");
  return run<int8_t, false>(b, args);
}
#endif

}  // namespace

// sizes: M, N, K, x's row stride, nnz, r, c, splits, kernel, activation, type of y, scaling of x.
CUDA_ON_CPU_EXPORT int run_bsr_linear(int dtype, int quantized, int transposed, const int64_t* s,
                                      const void* x, const void* values, const int* crow,
                                      const int* columns, const int* sorted, const int64_t* order,
                                      const float* bias, const float* scales,
                                      const int* weight_sums, const float* x_scale,
                                      const int8_t* x_zero, void* y, const int* row_order, int mode,
                                      unsigned seed, char* message) {
  return cuda_on_cpu::guarded(mode, seed, message, [&] {
    const Buffers b = {s[0], s[1],   s[2],        s[3],    s[4],   s[5], s[6],     s[7],   s[8],
                       s[9], s[10],  s[11],       x,       values, crow, columns,  sorted, order,
                       bias, scales, weight_sums, x_scale, x_zero, y,    row_order};
#ifdef CUDA_ON_CPU_BF16_ONLY  // compiles in a fraction of the time
    if (dtype == 2 && !quantized && !transposed) return run_float<__nv_bfloat16>(b, false);
    throw cuda_on_cpu::Error("no such kernel in this library");
#else
    if (quantized) {
      if (dtype == 0) return run_int8<float>(b);
      if (dtype == 1) return run_int8<__half>(b);
      return run_int8<__nv_bfloat16>(b);
    }
    if (dtype == 0) return run_float<float>(b, transposed);
    if (dtype == 1) return run_float<__half>(b, transposed);
    return run_float<__nv_bfloat16>(b, transposed);
#endif
  });
}

// sizes: M, N, K, nnz, r, c.
CUDA_ON_CPU_EXPORT int run_bsr_grad_values(int dtype, const int64_t* s, const void* grad,
                                           const void* x, const int* crow, const int* columns,
                                           float* result, int mode, unsigned seed, char* message) {
  return cuda_on_cpu::guarded(mode, seed, message, [&] {
    Buffers b = {};
    b.M = s[0], b.K = b.x_row_stride = s[1], b.nnz = s[3], b.r = s[4], b.c = s[5];
    b.x = grad, b.crow = crow, b.columns = columns, b.y = result;
    if (dtype == 2) return run_grad_values<__nv_bfloat16>(b, x, s[2]);
#ifdef CUDA_ON_CPU_BF16_ONLY
    throw cuda_on_cpu::Error("no such kernel in this library");
#else
    if (dtype == 0) return run_grad_values<float>(b, x, s[2]);
    return run_grad_values<__half>(b, x, s[2]);
#endif
  });
}

// Kernel, splits and sums of scratch.
CUDA_ON_CPU_EXPORT void plan_bsr_of(int64_t M, int64_t N, int64_t cells, int64_t multiprocessors,
                                    int64_t* plan) {
  const BsrPlan chosen = plan_bsr(M, N, cells, multiprocessors);
  plan[0] = static_cast<int64_t>(chosen.kernel);
  plan[1] = chosen.splits;
  plan[2] = chosen.partials;
}
