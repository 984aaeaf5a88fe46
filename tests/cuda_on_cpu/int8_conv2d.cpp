// Runs the CUDA kernels of int8_conv2d on buffers of a Python test.
#include "int8_conv2d.cuh"

#include <memory>
#include <string>

#include "runner.h"

namespace {

using namespace compressops;

struct Buffers {
  Int8Conv2dShape shape;
  const void* x;
  int64_t image_stride;
  bool x_last, y_last;
  const int8_t* weight;
  int64_t weight_count;
  bool packed;
  const float* weight_scales;
  const int* weight_sums;
  const float* bias;
  const float* x_scale;
  const int8_t* x_zero;
  void* y;
};

template <class T>
cudaError_t run(const Buffers& b, int activation, int scaling, int kernel, int64_t max_blocks) {
  const Int8Conv2dShape& shape = b.shape;
  const int64_t N = shape.N, K = shape.groups * shape.K, C = shape.groups * shape.C;
  const int64_t image = shape.in_pixels() * C;
  Int8Conv2dArgs<T> args;
  args.shape = shape;
  args.input.codes = shape.codes();
  args.input.x =
      Global<const T>(static_cast<const T*>(b.x), N ? (N - 1) * b.image_stride + image : 0, "x");
  args.input.image_stride = b.image_stride;
  args.input.channel_stride = b.x_last ? 1 : shape.in_pixels();
  args.input.pixel_stride = b.x_last ? C : 1;
  args.input.parts = range_parts(image);
  // Vectors, so that the scratch is as aligned as torch's.
  const int64_t q_count = N * args.input.codes.image_bytes(), bytes = shape.weight_bytes();
  const std::unique_ptr<int4[]> q(new int4[q_count / 16 + 1]), packed(new int4[bytes / 16 + 1]);
  const std::unique_ptr<unsigned[]> ranges(new unsigned[N * args.input.parts * 2 + 1]);
  const std::unique_ptr<float[]> x_scales(new float[N + 1]);
  const std::unique_ptr<int[]> x_zeros(new int[N + 1]);
  args.input.ranges = Global<unsigned>(ranges.get(), N * args.input.parts * 2, "ranges");
  args.input.q = Global<int8_t>(reinterpret_cast<int8_t*>(q.get()), q_count, "q");
  args.input.x_scales = Global<float>(x_scales.get(), N, "x_scales");
  args.scaling = static_cast<RowScaling>(scaling);
  RowZeros& zeros = args.input.x_zeros;
  if (b.x_scale) zeros.static_scale = Global<const float>(b.x_scale, 1, "x_scale");
  if (b.x_zero) zeros.static_zero = Global<const int8_t>(b.x_zero, 1, "x_zero");
  if (args.scaling != RowScaling::kSymmetric) {
    zeros.zeros = Global<int>(x_zeros.get(), N, "x_zeros");
  }
  const Global<const int8_t> weight(b.weight, b.weight_count, "weight");
  args.weight = weight;
  if (!b.packed) {
    const Global<int8_t> to(reinterpret_cast<int8_t*>(packed.get()), bytes, "packed");
    const cudaError_t error = launch_int8_conv2d_pack(shape, weight, to, nullptr);
    if (error != cudaSuccess) return error;
    args.weight = to;
  }
  args.weight_scales = Global<const float>(b.weight_scales, K, "weight_scales");
  args.weight_sums = Global<const int>(b.weight_sums, K, "weight_sums");
  if (b.bias) args.bias = Global<const float>(b.bias, K, "bias");
  args.activation = static_cast<Activation>(activation);
  args.y = Global<T>(static_cast<T*>(b.y), N * K * shape.out_pixels(), "y");
  args.y_last = b.y_last;
  return launch_int8_conv2d(args, /*multiprocessors=*/2, nullptr,
                            static_cast<Int8Conv2dKernel>(kernel), max_blocks);
}

Int8Conv2dShape shape_of(const int64_t* s) {
  const auto i = [s](int place) { return static_cast<int>(s[place]); };
  return {s[0],
          s[1],
          s[2],
          s[3],
          i(4),
          i(5),
          i(6),
          i(7),
          i(8),
          i(9),
          i(10),
          i(11),
          i(12),
          i(13),
          i(14),
          i(15),
          static_cast<Int8Conv2dForm>(i(16))};
}

}  // namespace

CUDA_ON_CPU_EXPORT int run_int8_conv2d(int dtype, const int64_t* sizes, const void* x,
                                       int64_t image_stride, int x_last, int y_last,
                                       const int8_t* weight, int64_t weight_count, int packed,
                                       const float* weight_scales, const int* weight_sums,
                                       const float* bias, const float* x_scale,
                                       const int8_t* x_zero, void* y, int activation, int scaling,
                                       int kernel, int64_t max_blocks, int order, unsigned seed,
                                       char* message) {
  return cuda_on_cpu::guarded(order, seed, message, [&] {
    const Buffers buffers = {shape_of(sizes),
                             x,
                             image_stride,
                             x_last != 0,
                             y_last != 0,
                             weight,
                             weight_count,
                             packed != 0,
                             weight_scales,
                             weight_sums,
                             bias,
                             x_scale,
                             x_zero,
                             y};
    if (dtype == 0) return run<float>(buffers, activation, scaling, kernel, max_blocks);
#ifndef CUDA_ON_CPU_FLOAT_ONLY  // compiles in half the time
    if (dtype == 1) return run<__half>(buffers, activation, scaling, kernel, max_blocks);
    if (dtype == 2) return run<__nv_bfloat16>(buffers, activation, scaling, kernel, max_blocks);
#endif
    throw cuda_on_cpu::Error("no dtype " + std::to_string(dtype));
  });
}

CUDA_ON_CPU_EXPORT int choose_int8_conv2d_kernel(const int64_t* sizes, int64_t multiprocessors) {
  return static_cast<int>(choose_int8_conv2d(shape_of(sizes), multiprocessors));
}
