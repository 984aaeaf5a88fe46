// bsr_linear and bsr_linear_grad_x on a CPU: rows of x in panels, [K][up to 24 rows], which stay in
// L2, times strips of 16 outputs, which stream by. Each 16 outputs of a panel's rows are summed in
// registers over all their blocks, and biased and activated while they are in L1.
#include "bsr_linear.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "bsr.h"
#include "bsr_strips.h"
#include "cpu_features.h"
#include "linear.h"

namespace compressops::cpu {

const BsrLinearKernels& bsr_linear_kernels() {
  const Features& cpu = features();
#if defined(__x86_64__)
  if (cpu.avx512) return bsr_linear_avx512();
  if (cpu.avx2) return bsr_linear_avx2();
#endif
  return bsr_linear_baseline();
}

namespace {

// out [M, outputs] of x [M, inputs].
void multiply(const BsrWeight& weight, const Tensor& x, Element element, int64_t inputs,
              const float* bias, Activation activation, Tensor& out) {
  const BsrLinearKernels& isa = bsr_linear_kernels();
  const int64_t M = out.numel() / weight.outputs, bytes = element_bytes(element);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  // A single row is a panel as it is.
  const bool direct =
      M == 1 && weight.r == kStrip && element == Element::kFloat && weight.inputs == inputs;
  BsrFinish how{};
  how.relu = activation == Activation::kRelu;
  how.gelu = activation == Activation::kGelu ? gelu() : nullptr;
  how.element = element, how.y_stride = weight.outputs;
  bsr_multiply(
      isa, weight, M, direct ? reinterpret_cast<const float*>(from) : nullptr,
      [&](int64_t m, int64_t rows, int64_t begin, int64_t end, float* panel, int64_t width) {
        const int64_t count = std::clamp<int64_t>(inputs - begin, 0, end - begin);
        isa.pack(from + (m * inputs + begin) * bytes, element, inputs, rows, count, panel, width,
                 width);
        std::fill(panel + count * width, panel + (end - begin) * width, 0.0f);
      },
      [&](int64_t m, int64_t rows, int64_t n, int64_t columns, float* sums) {
        BsrFinish own = how;  // of this thread
        own.rows = rows, own.columns = columns;
        own.bias = bias == nullptr ? nullptr : bias + n;
        own.y = to + (m * weight.outputs + n) * bytes;
        isa.finish(sums, own);
      });
}

// x · W.T, or x · W where it is transposed.
Tensor product(const char* op, const char* argument, const Tensor& x, const Tensor& values,
               const Tensor& crow_indices, const Tensor& col_indices, int64_t N, int64_t K,
               bool transposed, const std::optional<Tensor>& bias, const std::string& activation,
               const std::optional<Tensor>& row_order) {
  const Element element = element_of(op, x, argument);
  const Element stored = element_of(op, values, "values");
  const BsrBlocks blocks = check_blocks(op, values, crow_indices, col_indices, N, K, 1);
  check_row_order(op, row_order, blocks);
  const Activation parsed = parse_activation(op, activation);
  if (bias)
    COMPRESSOPS_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == N, op, "bias",
                      "a CPU tensor [" + std::to_string(N) + "]", *bias);
  const std::vector<float> biases = bias ? to_float(op, *bias, "bias") : std::vector<float>();
  Tensor out = new_output(op, argument, x, transposed ? K : N);
  if (out.numel() == 0) return out;
  const Tensor dense = as_contiguous(x);
  const float* offset = biases.empty() ? nullptr : biases.data();
  if (blocks.packed && !transposed) {
    multiply(packed_weight(blocks, stored, N, 1), dense, element, K, offset, parsed, out);
  } else {
    static thread_local Scratch memory;
    const BsrStrips strips =
        cut_strips(bsr_linear_kernels(), blocks, stored, N, K, 1, transposed, memory);
    multiply(strips.weight, dense, element, transposed ? N : K, offset, parsed, out);
  }
  return out;
}

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices,
                  const Tensor& col_indices, int64_t out_features,
                  const std::optional<Tensor>& bias, const std::string& activation,
                  const std::optional<Tensor>& row_order) {
  constexpr const char* kOp = "bsr_linear";
  COMPRESSOPS_CHECK(x.is_cpu() && x.dim() >= 1, kOp, "x", "a CPU tensor [..., K]", x);
  return product(kOp, "x", x, values, crow_indices, col_indices, out_features, x.size(x.dim() - 1),
                 false, bias, activation, row_order);
}

Tensor bsr_linear_grad_x(const Tensor& grad, const Tensor& values, const Tensor& crow_indices,
                         const Tensor& col_indices, int64_t in_features) {
  constexpr const char* kOp = "bsr_linear_grad_x";
  COMPRESSOPS_CHECK(grad.is_cpu() && grad.dim() >= 1, kOp, "grad", "a CPU tensor [..., N]", grad);
  return product(kOp, "grad", grad, values, crow_indices, col_indices, grad.size(grad.dim() - 1),
                 in_features, true, std::nullopt, "none", std::nullopt);
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("bsr_linear", TORCH_BOX(&compressops::cpu::bsr_linear));
  m.impl("bsr_linear_grad_x", TORCH_BOX(&compressops::cpu::bsr_linear_grad_x));
}
