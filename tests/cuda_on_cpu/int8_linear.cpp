// Runs the CUDA kernels of int8_linear on buffers of a Python test.
#include <memory>
#include <string>

#include "int8_linear_launch.cuh"
#include "runner.h"

namespace {

using namespace compressops;

constexpr int64_t kMultiprocessors = 2;

struct Buffers {
  int64_t M, N, K, x_row_stride;
  const void* x;
  const int8_t* weight;
  const float* weight_scales;
  const int* weight_sums;
  const float* bias;
  const float* x_scale;
  const int8_t* x_zero;
  void* y;
};

template <class T>
cudaError_t run(const Buffers& b, int activation, int scaling, int kernel, int64_t max_blocks,
                int capability) {
  const int64_t x_count = b.M ? (b.M - 1) * b.x_row_stride + b.K : 0;
  const int64_t q_count = b.M * padded_to_16(b.K);
  // Vectors, so that the scratch is as aligned as torch's.
  const std::unique_ptr<int4[]> q(new int4[q_count / 16 + 1]);
  const std::unique_ptr<float[]> x_scales(new float[b.M + 1]);
  const std::unique_ptr<int[]> x_zeros(new int[b.M + 1]);
  Int8LinearArgs<T> args;
  args.M = b.M;
  args.N = b.N;
  args.K = b.K;
  args.x = Global<const T>(static_cast<const T*>(b.x), x_count, "x");
  args.x_row_stride = b.x_row_stride;
  args.weight = Global<const int8_t>(b.weight, b.N * b.K, "weight");
  args.weight_scales = Global<const float>(b.weight_scales, b.N, "weight_scales");
  args.weight_sums = Global<const int>(b.weight_sums, b.N, "weight_sums");
  args.scaling = static_cast<RowScaling>(scaling);
  if (b.x_scale) args.x_zeros.static_scale = Global<const float>(b.x_scale, 1, "x_scale");
  if (b.x_zero) args.x_zeros.static_zero = Global<const int8_t>(b.x_zero, 1, "x_zero");
  if (args.scaling != RowScaling::kSymmetric) {
    args.x_zeros.zeros = Global<int>(x_zeros.get(), b.M, "x_zeros");
  }
  if (b.bias) args.bias = Global<const float>(b.bias, b.N, "bias");
  args.activation = static_cast<Activation>(activation);
  args.q = Global<int8_t>(reinterpret_cast<int8_t*>(q.get()), q_count, "q");
  args.x_scales = Global<float>(x_scales.get(), b.M, "x_scales");
  args.y = Global<T>(static_cast<T*>(b.y), b.M * b.N, "y");
#ifdef CUDA_ON_CPU_WGMMA_ONLY  // compiles in a fraction of the time
  static_cast<void>(capability);
  if (static_cast<Int8LinearKernel>(kernel) != Int8LinearKernel::kWgmma128) {
    throw cuda_on_cpu::Error("no such kernel in this library");
  }
  launch_quantize_rows<T>(args.x, args.x_row_stride, args.M, args.K, args.q, args.x_scales, nullptr,
                          max_blocks);
  return launch_int8_linear_wgmma<Int8Wgmma128>(args, kMultiprocessors, nullptr);
#else
  return launch_int8_linear(args, kMultiprocessors, capability, nullptr,
                            static_cast<Int8LinearKernel>(kernel), max_blocks);
#endif
}

}  // namespace

CUDA_ON_CPU_EXPORT int run_int8_linear(int dtype, int64_t M, int64_t N, int64_t K,
                                       int64_t x_row_stride, const void* x, const int8_t* weight,
                                       const float* weight_scales, const int* weight_sums,
                                       const float* bias, const float* x_scale,
                                       const int8_t* x_zero, void* y, int activation, int scaling,
                                       int kernel, int64_t max_blocks, int capability, int order,
                                       unsigned seed, char* message) {
  return cuda_on_cpu::guarded(order, seed, message, [&] {
    const Buffers buffers = {M,           N,    K,       x_row_stride, x, weight, weight_scales,
                             weight_sums, bias, x_scale, x_zero,       y};
#ifndef CUDA_ON_CPU_WGMMA_ONLY  // one type compiles in half the time
    if (dtype == 0) return run<float>(buffers, activation, scaling, kernel, max_blocks, capability);
#endif
#ifndef CUDA_ON_CPU_FLOAT_ONLY
    if (dtype == 1) {
      return run<__half>(buffers, activation, scaling, kernel, max_blocks, capability);
    }
#endif
#if !defined(CUDA_ON_CPU_FLOAT_ONLY) && !defined(CUDA_ON_CPU_WGMMA_ONLY)
    if (dtype == 2) {
      return run<__nv_bfloat16>(buffers, activation, scaling, kernel, max_blocks, capability);
    }
#endif
    throw cuda_on_cpu::Error("no dtype " + std::to_string(dtype));
  });
}

CUDA_ON_CPU_EXPORT int choose_int8_linear_kernel(int64_t M, int64_t N, int64_t multiprocessors,
                                                 int capability) {
  return static_cast<int>(choose_int8_linear(M, N, multiprocessors, capability));
}
