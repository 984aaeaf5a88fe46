// Runs the CUDA kernels of bsr_conv2d on buffers of a Python test.
#include "bsr_run.h"

namespace {

// b's x are images [N, H, W, C].
template <class T>
cudaError_t run_windows(const Buffers& b, int64_t images, const BsrWindows& windows) {
  BsrArgs<T> args;
  args.x =
      Global<const T>(static_cast<const T*>(b.x), images * windows.H * windows.W * windows.C, "x");
  args.x_columns = b.K;
  args.windows = windows;
  return run<T, false, true>(b, args);
}

}  // namespace

// sizes: N, K, C, H, W, OH, OW, R, S, strides, paddings and dilations of rows and columns; nnz, r,
// c, splits, kernel, activation, type of y.
CUDA_ON_CPU_EXPORT int run_bsr_conv2d(int dtype, const int64_t* s, const void* x,
                                      const void* values, const int* crow, const int* columns,
                                      const float* bias, void* y, const int* row_order, int mode,
                                      unsigned seed, char* message) {
  return cuda_on_cpu::guarded(mode, seed, message, [&] {
    const auto size = [&](int i) { return static_cast<int>(s[i]); };
    const BsrWindows windows = {size(3), size(4),  size(2),  size(5),  size(6),  size(8),
                                size(9), size(10), size(11), size(12), size(13), size(14)};
    Buffers b = {};
    b.M = s[0] * s[5] * s[6], b.N = s[1], b.K = s[7] * s[8] * s[2];
    b.nnz = s[15], b.r = s[16], b.c = s[17], b.splits = s[18], b.kernel = s[19];
    b.activation = s[20], b.y_type = s[21];
    b.x = x, b.values = values, b.crow = crow, b.columns = columns, b.bias = bias, b.y = y;
    b.row_order = row_order;
    if (dtype == 2) return run_windows<__nv_bfloat16>(b, s[0], windows);
#ifdef CUDA_ON_CPU_BF16_ONLY  // compiles in a fraction of the time
    throw cuda_on_cpu::Error("no such kernel in this library");
#else
    if (dtype == 0) return run_windows<float>(b, s[0], windows);
    return run_windows<__half>(b, s[0], windows);
#endif
  });
}
