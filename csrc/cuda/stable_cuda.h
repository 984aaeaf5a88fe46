// CUDA's side of LibTorch's stable ABI: streams, errors, and checks that ops share. Host code only.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <stdexcept>
#include <string>

#include "../check.h"
#include "activation.cuh"

namespace compressops {

inline void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
  }
}

// Only libtorch_cuda.so has this function, and torch has loaded it before any CUDA tensor exists.
// It is looked up there, so that the library links beside a torch without CUDA, with every missing
// symbol an error, and does not hang on the linker's keeping of an indirect dependency.
inline cudaStream_t current_stream(const Tensor& tensor, const char* op) {
  using GetStream = decltype(&aoti_torch_get_current_cuda_stream);
  static const auto get_stream = []() -> GetStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get_stream == nullptr) {
    throw std::runtime_error(std::string(op) +
                             ": libtorch_cuda.so is not loaded or has no "
                             "aoti_torch_get_current_cuda_stream");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t multiprocessor_count(const Tensor& tensor, const char* op) {
  int count = 0;
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()),
      op);
  return count;
}

inline bool is_float_dtype(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline Activation parse_activation(const std::string& name, const char* op) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  COMPRESSOPS_CHECK(name == "gelu", op, "activation", "'none', 'relu' or 'gelu'", name);
  return Activation::kGelu;
}

inline bool same_device(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

}  // namespace compressops
