// CUDA's side of LibTorch's stable ABI: streams, errors, and checks that ops share. Host code only.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "activation.cuh"

namespace compressops {

using OptionalTensor = std::optional<Tensor>;

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

inline int device_attribute(const Tensor& tensor, cudaDeviceAttr attribute, const char* op) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()), op);
  return value;
}

inline int64_t multiprocessor_count(const Tensor& tensor, const char* op) {
  return device_attribute(tensor, cudaDevAttrMultiProcessorCount, op);
}

// That a block may have if it asks the driver first.
inline int64_t shared_bytes_of_a_block(const Tensor& tensor, const char* op) {
  return device_attribute(tensor, cudaDevAttrMaxSharedMemoryPerBlockOptin, op);
}

// As 10 major + minor.
inline int compute_capability(const Tensor& tensor, const char* op) {
  return 10 * device_attribute(tensor, cudaDevAttrComputeCapabilityMajor, op) +
         device_attribute(tensor, cudaDevAttrComputeCapabilityMinor, op);
}

// Tickets for split_sums.cuh: zeros, at least `count`, which launches leave as zeros. Those of one
// stream follow one another and share them, so that no call has to clear them. What a graph
// captures may be replayed on any stream: it gets zeros of its own, which each replay clears.
inline Tensor stream_tickets(const Tensor& x, int64_t count, cudaStream_t stream, const char* op) {
  cudaStreamCaptureStatus capturing;
  check_cuda(cudaStreamIsCapturing(stream, &capturing), op);
  if (capturing != cudaStreamCaptureStatusNone) {
    return torch::stable::new_zeros(x, {count}, ScalarType::Int);
  }
  struct Kept {
    std::mutex mutex;
    std::map<std::pair<int, cudaStream_t>, Tensor> of_stream;
  };
  static Kept& kept = *new Kept;  // never destroyed: at exit the driver may be gone before
  const std::lock_guard lock(kept.mutex);
  const std::pair key(static_cast<int>(x.get_device_index()), stream);
  const auto found = kept.of_stream.find(key);
  if (found != kept.of_stream.end() && found->second.numel() >= count) return found->second;
  const Tensor tickets = torch::stable::new_zeros(x, {count}, ScalarType::Int);
  kept.of_stream.insert_or_assign(key, tickets);
  return tickets;
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

// A tensor of these sizes on x's device.
inline void check_operand(const char* op, const Tensor& tensor, const char* argument,
                          const char* dtype_name, ScalarType dtype,
                          const std::vector<int64_t>& shape, const Tensor& x) {
  bool fits = same_device(tensor, x) && tensor.scalar_type() == dtype &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  std::string shape_text;
  for (size_t i = 0; i < shape.size(); ++i) {
    fits = fits && tensor.size(static_cast<int64_t>(i)) == shape[i];
    shape_text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  COMPRESSOPS_CHECK(fits, op, argument,
                    std::string("a ") + dtype_name + " tensor [" + shape_text + "] on x's device",
                    tensor);
}

// The bias of `count` outputs as the kernels read it: contiguous, in float32.
inline OptionalTensor checked_bias(const char* op, const OptionalTensor& bias, int64_t count,
                                   const Tensor& x) {
  if (!bias) return bias;
  COMPRESSOPS_CHECK(
      same_device(*bias, x) && bias->dim() == 1 && bias->size(0) == count && is_float_dtype(*bias),
      op, "bias", "a float tensor [" + std::to_string(count) + "] on x's device", *bias);
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* data_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline bool is_dense(const Tensor& tensor, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (int dim : order) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// As torch's: channels last, and not contiguous as well.
inline bool is_channels_last(const Tensor& tensor) {
  return tensor.numel() > 0 && is_dense(tensor, {1, 3, 2, 0}) && !is_dense(tensor, {3, 2, 1, 0});
}

// [N, C, H, W] of x's dtype and device, without values.
inline Tensor new_images(const Tensor& x, const std::vector<int64_t>& size, bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(x, size);
  const Tensor y = torch::stable::new_empty(x, {size[0], size[2], size[3], size[1]});
  return torch::stable::transpose(torch::stable::transpose(y, 2, 3), 1, 2);
}

// Rows or columns of a convolution's result.
inline int64_t out_size(int64_t size, int64_t taps, int64_t stride, int64_t padding,
                        int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (taps - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// call(T{}) with the element type of a tensor that is_float_dtype.
template <class Call>
void with_element_type(const Tensor& tensor, const Call& call) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return call(__half{});
    case ScalarType::BFloat16:
      return call(__nv_bfloat16{});
    default:
      return call(float{});
  }
}

}  // namespace compressops
