// bsr_int8_linear on a CPU: bsr_linear with quads of int8 for floats. Each row of x is quantized to
// u8; the sums of a panel's rows and 16 outputs are scaled while they are in L1.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "bsr.h"
#include "bsr_strips.h"
#include "cpu_features.h"
#include "linear.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "bsr_int8_linear";
constexpr int64_t kQuad = 4;

const BsrLinearKernels& kernels() {
  const Features& cpu = features();
#if defined(__x86_64__)
  if (cpu.avx512_vnni) return bsr_int8_linear_avx512();
  if (cpu.avx2) return bsr_int8_linear_avx2();
#endif
  return bsr_int8_linear_baseline();
}

// A CPU vector [N] of a type, contiguous.
Tensor check_vector(const char* argument, const Tensor& tensor, ScalarType type, const char* name,
                    int64_t N) {
  COMPRESSOPS_CHECK(
      tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == N && tensor.scalar_type() == type,
      kOp, argument, std::string("a CPU ") + name + " tensor [" + std::to_string(N) + "]", tensor);
  return as_contiguous(tensor);
}

void multiply(const BsrWeight& weight, const Tensor& x, int64_t K, const Quantization& quantization,
              const float* scales, const int32_t* weight_sums, const float* bias,
              Activation activation, Tensor& out) {
  const BsrLinearKernels& isa = kernels();
  const Element element = element_of(kOp, x, "x");
  const int64_t M = out.numel() / weight.outputs, bytes = element_bytes(element);
  const int64_t padded = weight.inputs * kQuad;
  std::unique_ptr<uint8_t[]> q(new uint8_t[std::max<int64_t>(1, M * padded)]);
  std::unique_ptr<RowScale[]> rows_of_x(new RowScale[M]);
  with_element_type(kOp, x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantize_rows(static_cast<const T*>(x.const_data_ptr()), M, K, padded, quantization, q.get(),
                  padded, [&](int64_t m, RowScale row) { rows_of_x[m] = row; });
  });
  char* to = static_cast<char*>(out.mutable_data_ptr());
  BsrFinish how{};
  how.relu = activation == Activation::kRelu;
  how.gelu = activation == Activation::kGelu ? gelu() : nullptr;
  how.element = element, how.y_stride = weight.outputs;
  bsr_multiply(
      isa, weight, M, nullptr,
      [&](int64_t m, int64_t rows, int64_t begin, int64_t end, float* panel, int64_t width) {
        isa.pack(q.get() + m * padded + begin * kQuad, Element::kFloat, weight.inputs, rows,
                 end - begin, panel, width, width);
      },
      [&](int64_t m, int64_t rows, int64_t n, int64_t columns, float* sums) {
        isa.scale(sums, rows, columns, {rows_of_x.get() + m, scales + n, weight_sums + n});
        BsrFinish own = how;  // of this thread
        own.rows = rows, own.columns = columns;
        own.bias = bias == nullptr ? nullptr : bias + n;
        own.y = to + (m * weight.outputs + n) * bytes;
        isa.finish(sums, own);
      });
}

Tensor bsr_int8_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices,
                       const Tensor& col_indices, const Tensor& weight_scales,
                       const Tensor& weight_sums, const std::optional<Tensor>& bias,
                       const std::string& activation_name, const std::optional<Tensor>& x_scale,
                       const std::optional<Tensor>& x_zero, bool symmetric,
                       const std::optional<Tensor>& row_order) {
  COMPRESSOPS_CHECK(x.is_cpu() && x.dim() >= 1, kOp, "x", "a CPU tensor [..., K]", x);
  element_of(kOp, x, "x");
  COMPRESSOPS_CHECK(weight_scales.dim() == 1, kOp, "weight_scales", "a CPU float32 tensor [N]",
                    weight_scales);
  const int64_t N = weight_scales.size(0), K = x.size(x.dim() - 1);
  const Tensor scales =
      check_vector("weight_scales", weight_scales, ScalarType::Float, "float32", N);
  const Tensor sums = check_vector("weight_sums", weight_sums, ScalarType::Int, "int32", N);
  const Quantization how = quantization_of(kOp, x_scale, x_zero, symmetric);
  const int64_t most = max_terms(how);
  COMPRESSOPS_CHECK(K <= most, kOp, "x", "at most " + std::to_string(most) + " wide (int32 sums)",
                    x);
  COMPRESSOPS_CHECK(values.scalar_type() == ScalarType::Char, kOp, "values", "int8", values);
  const BsrBlocks blocks = check_blocks(kOp, values, crow_indices, col_indices, N, K, kQuad);
  check_row_order(kOp, row_order, blocks);
  if (bias)
    COMPRESSOPS_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == N, kOp, "bias",
                      "a CPU tensor [" + std::to_string(N) + "]", *bias);
  const Activation activation = parse_activation(kOp, activation_name);
  const std::vector<float> biases = bias ? to_float(kOp, *bias, "bias") : std::vector<float>();
  Tensor out = new_output(kOp, "x", x, N);
  if (out.numel() == 0) return out;
  const Tensor dense = as_contiguous(x);
  const auto run = [&](const BsrWeight& weight) {
    multiply(weight, dense, K, how, static_cast<const float*>(scales.const_data_ptr()),
             static_cast<const int32_t*>(sums.const_data_ptr()),
             biases.empty() ? nullptr : biases.data(), activation, out);
  };
  if (blocks.packed) {
    run(packed_weight(blocks, Element::kFloat, N, kQuad));
  } else {
    static thread_local Scratch memory;
    const BsrStrips strips =
        cut_strips(kernels(), blocks, Element::kFloat, N, K, kQuad, false, memory);
    run(strips.weight);
  }
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("bsr_int8_linear", TORCH_BOX(&compressops::cpu::bsr_int8_linear));
}
