// Runs CUDA kernels on a CPU, to find their mistakes where there is no GPU.
//
// csrc/cuda/device.cuh includes this in place of the CUDA toolkit when g++ compiles it. A launch
// runs to its end, block after block, with each thread a fiber; `options` says in which order.
// What a kernel does wrong is thrown as cuda_on_cpu::Error, which names block, thread, array and
// index. It is no model of speed, of the memory hierarchy or of races in global memory.
#pragma once

#include "hopper.h"

namespace compressops {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t /*stream*/, Args... args) {
  cuda_on_cpu::run_grid(kernel, grid, block, shared_bytes, args...);
  return cudaSuccess;
}

// One kernel runs after the other.
template <class... Params, class... Args>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                         cudaStream_t stream, Args... args) {
  return launch(kernel, grid, block, shared_bytes, stream, args...);
}

}  // namespace compressops
