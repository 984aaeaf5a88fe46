// round_rows on a CPU: rows of activations as the integer products see them, in floats.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "linear.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "round_rows";

// The largest number of the type.
template <class T>
constexpr float kLargest = std::numeric_limits<float>::max();
template <>
constexpr float kLargest<torch::headeronly::Half> = 65504.0f;
template <>
constexpr float kLargest<torch::headeronly::BFloat16> = 0x1.fep127f;

// Where the rows of a tensor begin, one after the other: those of attention's heads are parts of
// wider rows, and are read there.
class Rows {
 public:
  Rows(const Tensor& x, int64_t first) {
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      dims_.push_back({x.size(d), x.stride(d), first % x.size(d)});
      first /= x.size(d);
      offset_ += dims_.back().index * dims_.back().stride;
    }
  }
  int64_t offset() const { return offset_; }
  void next() {
    for (Dimension& d : dims_) {
      offset_ += d.stride;
      if (++d.index < d.size) return;
      offset_ -= d.size * d.stride;
      d.index = 0;
    }
  }

 private:
  struct Dimension {
    int64_t size, stride, index;
  };
  std::vector<Dimension> dims_;  // the innermost first
  int64_t offset_ = 0;
};

Tensor round_rows(Tensor x, bool symmetric) {
  COMPRESSOPS_CHECK(x.is_cpu() && x.dim() >= 1, kOp, "x", "a CPU tensor [..., K]", x);
  with_element_type(kOp, x, "x", [](auto*) {});
  const int64_t K = x.size(x.dim() - 1);
  Tensor out = new_output(kOp, "x", x, K);
  if (out.numel() == 0) return out;
  const Tensor from = x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
  Quantization how;
  how.kind = symmetric ? Quantization::kSymmetric : Quantization::kAsymmetric;
  with_element_type(kOp, x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* input = static_cast<const T*>(from.const_data_ptr());
    T* output = static_cast<T*>(out.mutable_data_ptr());
    const RoundRow round = round_row();
    how.largest = kLargest<T>;
    // A thread is worth starting for about 16 K elements.
    const int64_t grain = std::max<int64_t>(1, 16384 / K);
    torch::stable::parallel_for(0, out.numel() / K, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(std::is_same_v<T, float> ? 0 : K);
      Rows rows(from, begin);
      for (int64_t m = begin; m < end; ++m, rows.next()) {
        const T* row = input + rows.offset();
        if constexpr (std::is_same_v<T, float>) {
          round(row, output + m * K, K, how);
        } else {
          std::copy(row, row + K, buffer.begin());
          round(buffer.data(), buffer.data(), K, how);
          std::copy(buffer.begin(), buffer.end(), output + m * K);
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("round_rows", TORCH_BOX(&compressops::cpu::round_rows));
}
