// Runs the CUDA kernels of winograd_conv2d on buffers of a Python test.
#include "winograd_conv2d.cuh"

#include <memory>
#include <string>

#include "runner.h"

namespace {

using namespace compressops;

struct Buffers {
  WinogradShape shape;
  WinogradStrides x_strides;
  const void* x;
  int64_t x_count;
  const void* u;
  const float* bias;
  void* y;
  bool channels_last;
};

// `sizes`: N, groups, C, K (of a group), H, W, padding_h, padding_w, r, tile, and whether the
// kernel has one row.
WinogradShape shape_of(const int64_t* sizes) {
  return make_winograd_shape(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                             sizes[7], sizes[8], sizes[9], sizes[10] != 0);
}

template <class T>
cudaError_t run(const Buffers& b, int activation, int kernel, int64_t scratch_bytes) {
  const WinogradShape& s = b.shape;
  const int64_t K = s.groups * s.K, pixels = s.OH * s.OW;
  WinogradArgs<T> args = {};
  args.shape = s;
  args.x = Global<const T>(static_cast<const T*>(b.x), b.x_count, "x");
  args.x_strides = b.x_strides;
  args.u = Global<const T>(static_cast<const T*>(b.u), s.positions() * K * s.C, "u");
  if (b.bias) args.bias = Global<const float>(b.bias, K, "bias");
  args.activation = static_cast<Activation>(activation);
  args.y = Global<T>(static_cast<T*>(b.y), s.N * K * pixels, "y");
  args.y_strides = b.channels_last ? WinogradStrides{K * pixels, 1, K * s.OW, K}
                                   : WinogradStrides{K * pixels, pixels, s.OW, 1};
  const WinogradPlan plan =
      plan_winograd_conv2d(args, /*multiprocessors=*/2, /*shared_bytes=*/163 * 1024, scratch_bytes,
                           static_cast<WinogradKernel>(kernel));
  // Vectors, so that the scratch is as aligned as torch's.
  const std::unique_ptr<int4[]> scratch(new int4[plan.scratch_bytes() / 16 + 1]);
  const auto bytes = reinterpret_cast<unsigned char*>(scratch.get());
  std::memset(bytes, 0xff, plan.scratch_bytes());  // NaN: nothing may read what was not written
  return launch_winograd_conv2d(
      args, plan, view_as<int4>(Global<unsigned char>(bytes, plan.scratch_bytes(), "scratch")),
      nullptr);
}

}  // namespace

CUDA_ON_CPU_EXPORT int run_winograd_conv2d(int dtype, const int64_t* sizes,
                                           const int64_t* x_strides, const void* x, int64_t x_count,
                                           const void* u, const float* bias, void* y,
                                           int channels_last, int activation, int kernel,
                                           int64_t scratch_bytes, int order, unsigned seed,
                                           char* message) {
  return cuda_on_cpu::guarded(order, seed, message, [&] {
    const Buffers buffers = {shape_of(sizes),
                             {x_strides[0], x_strides[1], x_strides[2], x_strides[3]},
                             x,
                             x_count,
                             u,
                             bias,
                             y,
                             channels_last != 0};
#ifndef CUDA_ON_CPU_HALF_ONLY  // compiles faster
    if (dtype == 0) return run<float>(buffers, activation, kernel, scratch_bytes);
    if (dtype == 2) return run<__nv_bfloat16>(buffers, activation, kernel, scratch_bytes);
#endif
    if (dtype == 1) return run<__half>(buffers, activation, kernel, scratch_bytes);
    throw cuda_on_cpu::Error("no dtype " + std::to_string(dtype));
  });
}

// Of aligned tensors: kernel, tiles and groups of a chunk, bytes of scratch.
CUDA_ON_CPU_EXPORT void plan_winograd_conv2d_of(int half, const int64_t* sizes, int channels_last,
                                                int64_t multiprocessors, int64_t shared_bytes,
                                                int64_t scratch_bytes, int64_t* plan) {
  const auto make = [&](auto args) {
    args.shape = shape_of(sizes);
    args.y_strides.c = channels_last ? 1 : args.shape.OH * args.shape.OW;
    return plan_winograd_conv2d(args, multiprocessors, shared_bytes, scratch_bytes);
  };
  const WinogradPlan made = half ? make(WinogradArgs<__half>{}) : make(WinogradArgs<float>{});
  plan[0] = static_cast<int64_t>(made.kernel);
  plan[1] = made.tiles;
  plan[2] = made.groups;
  plan[3] = made.scratch_bytes();
}
