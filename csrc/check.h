// Argument checks of every op. A failed check raises ValueError in Python with the op, the
// argument, what it must be, and the value that was given.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace compressops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor itself where it is contiguous: asking the dispatcher for that costs half a
// microsecond.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::string describe(const Tensor& tensor) {
  std::ostringstream out;
  out << "a tensor of dtype " << torch::headeronly::toString(tensor.scalar_type()) << ", shape [";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << "], strides [";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.stride(i);
  out << "] on " << (tensor.is_cuda() ? "cuda" : tensor.is_cpu() ? "cpu" : "another device");
  return out.str();
}
inline std::string describe(int64_t value) { return std::to_string(value); }
inline std::string describe(const std::string& value) { return "'" + value + "'"; }

template <typename T>
[[noreturn]] void fail_argument(const char* op, const char* argument,
                                const std::string& requirement, const T& value) {
  throw std::invalid_argument(std::string(op) + ": argument '" + argument + "' must be " +
                              requirement + ", got " + describe(value));
}

}  // namespace compressops

#define COMPRESSOPS_CHECK(condition, op, argument, requirement, value)                \
  do {                                                                                \
    if (!(condition)) ::compressops::fail_argument(op, argument, requirement, value); \
  } while (0)

namespace compressops {

// Of the convolutions.
inline void check_padding(const char* op, const std::vector<int64_t>& padding) {
  // So that sizes cannot overflow before they are asked for as memory.
  constexpr int64_t kMost = int64_t{1} << 60;
  COMPRESSOPS_CHECK(padding.size() == 2, op, "padding", "two integers from 0 to 2^60",
                    std::to_string(padding.size()) + " integers");
  for (int64_t zeros : padding)
    COMPRESSOPS_CHECK(zeros >= 0 && zeros <= kMost, op, "padding", "two integers from 0 to 2^60",
                      zeros);
}

inline void check_pair(const char* op, const char* argument, const std::vector<int64_t>& values,
                       int64_t least) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  const std::string requirement = "two integers from " + std::to_string(least) + " to 2^31 - 1";
  COMPRESSOPS_CHECK(values.size() == 2, op, argument, requirement,
                    std::to_string(values.size()) + " integers");
  for (int64_t value : values)
    COMPRESSOPS_CHECK(value >= least && value <= kMost, op, argument, requirement, value);
}

}  // namespace compressops
