// Runs the CUDA kernels of int4_linear and ternary_linear on buffers of a Python test.
#include <string>

#include "packed_linear_launch.cuh"
#include "quantize_rows.cuh"
#include "runner.h"
#include "scratch.h"

namespace {

using namespace compressops;
using cuda_on_cpu::Scratch;

constexpr int64_t kMultiprocessors = 2, kSharedBytes = 227 * 1024;

struct Buffers {
  int64_t M, N, K, x_row_stride, group_size;
  const void* x;
  const uint8_t* weight;
  const float* scales;
  const uint8_t* zeros;
  const float* bias;
  void* y;
  int y_type, activation, kernel;
  int64_t splits;
  int capability;
};

template <int kBits, class Input>
cudaError_t run(const Buffers& b, Global<const Input> x, int64_t x_row_stride, int64_t x_columns,
                int64_t parts, Global<const float> x_scales) {
  const bool hopper =
      packed_linear_fits_wgmma<kBits, Input>(b.M, b.N, b.K, parts, b.group_size, b.capability);
  const auto plan =
      plan_packed_linear(b.M, b.N, b.K, parts, {kMultiprocessors, b.capability, kSharedBytes},
                         hopper, static_cast<PackedLinearKernel>(b.kernel), b.splits);
  const int64_t groups = b.K ? ceil_div(b.K, b.group_size) : 0;
  const int64_t rows = 8 * kLaneOutputs<kBits>;
  const int64_t lanes = ceil_div(b.N, rows) * ceil_div<int64_t>(b.K, kStepK) * kWarpSize;
  const Scratch<float> partials(plan.partials, "partials");
  const Scratch<unsigned> tickets(plan.tiles, "tickets");
  for (int64_t i = 0; i < plan.tiles; ++i) tickets.array()[i] = 0;
  // An earlier launch may have left the right ones there.
  for (int64_t i = 0; i < plan.partials; ++i) partials.array()[i] = NAN;
  PackedLinearArgs<Input> args;
  args.M = b.M;
  args.N = b.N;
  args.K = b.K;
  args.x = x;
  args.x_row_stride = x_row_stride;
  args.x_columns = x_columns;
  args.parts = parts;
  args.x_scales = x_scales;
  args.weight = Global<const int4>(reinterpret_cast<const int4*>(b.weight), lanes, "weight");
  args.scales = Global<const float>(b.scales, groups * b.N, "scales");
  if (b.zeros) args.zeros = Global<const uint8_t>(b.zeros, groups * b.N, "zeros");
  args.group_size = b.group_size;
  if (b.bias) args.bias = Global<const float>(b.bias, b.N, "bias");
  args.activation = static_cast<Activation>(b.activation);
  args.splits = plan.splits;
  args.partials = partials.array();
  args.tickets = tickets.array();
  args.y_type = static_cast<FloatType>(b.y_type);
  const int64_t bytes = b.M * b.N * (b.y_type == 0 ? 4 : 2);
  args.y = Global<uint8_t>(static_cast<uint8_t*>(b.y), bytes, "y");
#ifdef CUDA_ON_CPU_WGMMA_ONLY  // compiles in a fraction of the time
  return launch_packed_linear_wgmma(args, plan.tiles, kMultiprocessors, nullptr);
#else
  const cudaError_t error = launch_packed_linear<kBits>(args, plan, kMultiprocessors, nullptr);
  for (int64_t i = 0; i < plan.tiles; ++i) {
    if (tickets.array()[i] != 0) throw cuda_on_cpu::Error("a ticket is left for the next launch");
  }
  return error;
#endif
}

template <class T>
Global<const T> rows_of(const Buffers& b) {
  const int64_t count = b.M ? (b.M - 1) * b.x_row_stride + b.K : 0;
  return Global<const T>(static_cast<const T*>(b.x), count, "x");
}

template <int kBits, class T>
cudaError_t run_quantized(const Buffers& b) {
  const Scratch<int8_t> q(b.M * padded_to_16(b.K), "q");
  const Scratch<float> x_scales(b.M, "x_scales");
  launch_quantize_rows<T>(rows_of<T>(b), b.x_row_stride, b.M, b.K, q.array(), x_scales.array(),
                          nullptr);
  return run<kBits, int8_t>(b, q.array(), padded_to_16(b.K), padded_to_16(b.K), 1,
                            x_scales.array());
}

template <class T, class Input>
cudaError_t run_float(const Buffers& b) {
  const auto x = rows_of<T>(b);
  if constexpr (std::is_same_v<T, Input>) {
    if (b.K % 8 == 0 && b.x_row_stride % 8 == 0 && misalignment(x, 16) == 0) {
      return run<4, Input>(b, x, b.x_row_stride, b.K, 1, nullptr);
    }
  }
  const int64_t parts = std::is_same_v<T, Input> ? 1 : 3, columns = ceil_div<int64_t>(b.K, 8) * 8;
  const Scratch<Input> packed(parts * b.M * columns, "packed x");
  launch_pack_rows<T, Input>(x, b.x_row_stride, b.M, b.K, columns, packed.array(), kMultiprocessors,
                             nullptr);
  return run<4, Input>(b, packed.array(), columns, columns, parts, nullptr);
}

}  // namespace

CUDA_ON_CPU_EXPORT int run_packed_linear(int bits, int quantize_x, int dtype, const int64_t* sizes,
                                         const void* x, const uint8_t* weight, const float* scales,
                                         const uint8_t* zeros, const float* bias, void* y,
                                         int activation, int kernel, int64_t splits, int capability,
                                         int order, unsigned seed, char* message) {
  return cuda_on_cpu::guarded(order, seed, message, [&] {
    const Buffers b = {sizes[0],   sizes[1], sizes[2], sizes[3],  sizes[4], x,
                       weight,     scales,   zeros,    bias,      y,        dtype,
                       activation, kernel,   splits,   capability};
#ifdef CUDA_ON_CPU_WGMMA_ONLY
    if (!quantize_x && bits == 4 && dtype == 1) return run_float<__half, __half>(b);
    throw cuda_on_cpu::Error("no such kernel in this library");
#else
    if (quantize_x && bits == 2) {
      if (dtype == 0) return run_quantized<2, float>(b);
      if (dtype == 1) return run_quantized<2, __half>(b);
      return run_quantized<2, __nv_bfloat16>(b);
    }
#ifdef CUDA_ON_CPU_INT8_ONLY  // compiles in a fraction of the time
    throw cuda_on_cpu::Error("no such kernel in this library");
#else
    if (quantize_x) {
      if (dtype == 0) return run_quantized<4, float>(b);
      if (dtype == 1) return run_quantized<4, __half>(b);
      return run_quantized<4, __nv_bfloat16>(b);
    }
    if (dtype == 0) return run_float<float, __nv_bfloat16>(b);
    if (dtype == 1) return run_float<__half, __half>(b);
    return run_float<__nv_bfloat16, __nv_bfloat16>(b);
#endif
#endif
  });
}

// Kernel, splits, teams of a block and floats of scratch.
CUDA_ON_CPU_EXPORT void plan_packed_linear_of(int64_t M, int64_t N, int64_t K,
                                              int64_t multiprocessors, int64_t shared_bytes,
                                              int capability, int hopper, int64_t* plan) {
  const auto chosen =
      plan_packed_linear(M, N, K, 1, {multiprocessors, capability, shared_bytes}, hopper != 0);
  plan[0] = static_cast<int64_t>(chosen.kernel);
  plan[1] = chosen.splits;
  plan[2] = chosen.teams;
  plan[3] = chosen.partials;
}
