// CUDA's side of LibTorch's stable ABI: streams and errors. Host code only.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <stdexcept>
#include <string>

#include "../check.h"

// Only a torch with CUDA has this function. A weak reference lets the library link beside one
// without, with every other missing symbol still an error.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace compressops {

inline void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
  }
}

inline cudaStream_t current_stream(const Tensor& tensor, const char* op) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error(std::string(op) + ": this torch is built without CUDA");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t multiprocessor_count(const Tensor& tensor, const char* op) {
  int count = 0;
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()),
      op);
  return count;
}

inline bool same_device(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

}  // namespace compressops
