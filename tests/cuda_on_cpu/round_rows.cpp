// Runs the CUDA kernels of round_rows on buffers of a Python test.
#include "round_rows.cuh"

#include <string>

#include "runner.h"

namespace {

using namespace compressops;

template <class T>
cudaError_t run(const StridedRows& rows, int64_t K, const void* x, int64_t x_count, void* y,
                bool symmetric, int64_t max_blocks) {
  const RoundRowsArgs<T> args = {rows, K, Global<const T>(static_cast<const T*>(x), x_count, "x"),
                                 Global<T>(static_cast<T*>(y), rows.count() * K, "y")};
  return symmetric ? launch_round_rows<T, RowScaling::kSymmetric>(args, nullptr, max_blocks)
                   : launch_round_rows<T, RowScaling::kAsymmetric>(args, nullptr, max_blocks);
}

}  // namespace

// sizes: of three dimensions, and of a row.
CUDA_ON_CPU_EXPORT int run_round_rows(int dtype, const int64_t* sizes, const int64_t* strides,
                                      const void* x, int64_t x_count, void* y, int symmetric,
                                      int64_t max_blocks, int order, unsigned seed, char* message) {
  return cuda_on_cpu::guarded(order, seed, message, [&] {
    const StridedRows rows = {{sizes[0], sizes[1], sizes[2]}, {strides[0], strides[1], strides[2]}};
    if (dtype == 0) return run<float>(rows, sizes[3], x, x_count, y, symmetric, max_blocks);
    if (dtype == 1) return run<__half>(rows, sizes[3], x, x_count, y, symmetric, max_blocks);
    if (dtype == 2) return run<__nv_bfloat16>(rows, sizes[3], x, x_count, y, symmetric, max_blocks);
    throw cuda_on_cpu::Error("no dtype " + std::to_string(dtype));
  });
}
