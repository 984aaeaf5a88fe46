// int8_linear on a CPU: quantize each row of x to u8, multiply by the packed int8 weights, and
// scale, add the bias and activate while the sums are still in L1.
#include "int8_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../check.h"
#include "cpu_features.h"
#include "linear.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "int8_linear";

const Int8LinearKernels& kernels() {
  const Features& cpu = features();
#if defined(__x86_64__)
  if (cpu.avx512_vnni) return int8_linear_avx512();
  if (cpu.avx2) return int8_linear_avx2();
#endif
  return int8_linear_baseline();
}

struct Weight {
  Tensor panels;  // [ceil(N / 16)][ceil(K / 4)][16][4]
  int64_t k_blocks;
};

// Row-major [N, K] weights are packed for this call; 4-D ones are taken as they are.
Weight packed_weight(const Tensor& weight, int64_t N, int64_t K) {
  const int64_t panels = (N + kColumns - 1) / kColumns, k_blocks = (K + kDepth - 1) / kDepth;
  if (weight.dim() == 4) return {as_contiguous(weight), k_blocks};
  const Tensor rows = as_contiguous(weight);
  Tensor out = torch::stable::new_zeros(rows, {panels, k_blocks, kColumns, kDepth});
  const int8_t* from = static_cast<const int8_t*>(rows.const_data_ptr());
  int8_t* to = static_cast<int8_t*>(out.mutable_data_ptr());
  for (int64_t n = 0; n < N; ++n)
    for (int64_t b = 0; b < k_blocks; ++b)
      std::memcpy(to + ((n / kColumns * k_blocks + b) * kColumns + n % kColumns) * kDepth,
                  from + n * K + b * kDepth, std::min(kDepth, K - b * kDepth));
  return {out, k_blocks};
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scales,
                   const Tensor& weight_sums, const std::optional<Tensor>& bias,
                   const std::string& activation_name, const std::optional<Tensor>& x_scale,
                   const std::optional<Tensor>& x_zero, bool symmetric) {
  COMPRESSOPS_CHECK(x.is_cpu() && x.dim() >= 1, kOp, "x", "a CPU tensor [..., K]", x);
  COMPRESSOPS_CHECK(weight_scales.is_cpu() && weight_scales.dim() == 1 &&
                        weight_scales.scalar_type() == ScalarType::Float,
                    kOp, "weight_scales", "a CPU float32 tensor [N]", weight_scales);
  const int64_t N = weight_scales.size(0), K = x.size(x.dim() - 1);
  const Quantization how = quantization_of(kOp, x_scale, x_zero, symmetric);
  const int64_t most = max_terms(how);
  COMPRESSOPS_CHECK(K <= most, kOp, "x", "at most " + std::to_string(most) + " wide (int32 sums)",
                    x);
  const bool fits = weight.dim() == 2
                        ? weight.size(0) == N && weight.size(1) == K
                        : weight.dim() == 4 && weight.size(0) == (N + kColumns - 1) / kColumns &&
                              weight.size(1) == (K + kDepth - 1) / kDepth &&
                              weight.size(2) == kColumns && weight.size(3) == kDepth;
  COMPRESSOPS_CHECK(fits && weight.is_cpu() && weight.scalar_type() == ScalarType::Char, kOp,
                    "weight",
                    "a CPU int8 tensor [" + std::to_string(N) + ", " + std::to_string(K) +
                        "] or that packed as [ceil(N/16), ceil(K/4), 16, 4]",
                    weight);
  COMPRESSOPS_CHECK(weight_sums.is_cpu() && weight_sums.dim() == 1 && weight_sums.size(0) == N &&
                        weight_sums.scalar_type() == ScalarType::Int,
                    kOp, "weight_sums", "a CPU int32 tensor [" + std::to_string(N) + "]",
                    weight_sums);
  if (bias)
    COMPRESSOPS_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == N, kOp, "bias",
                      "a CPU tensor [" + std::to_string(N) + "]", *bias);
  const Activation activation = parse_activation(kOp, activation_name);

  Tensor out = new_output(kOp, "x", x, N);
  const int64_t M = N == 0 ? 0 : out.numel() / N;
  with_element_type(kOp, x, "x", [](auto*) {});
  const std::vector<float> biases = bias ? to_float(kOp, *bias, "bias") : std::vector<float>();
  if (M == 0 || N == 0) return out;

  const Tensor dense_x = as_contiguous(x);
  const Weight packed = packed_weight(weight, N, K);
  const Tensor dense_scales = as_contiguous(weight_scales);
  const Tensor dense_sums = as_contiguous(weight_sums);
  const float* scales = static_cast<const float*>(dense_scales.const_data_ptr());
  const int32_t* sums = static_cast<const int32_t*>(dense_sums.const_data_ptr());
  const int8_t* panels_start = static_cast<const int8_t*>(packed.panels.const_data_ptr());
  const Int8LinearKernels& isa = kernels();

  // An odd number of cache lines: the rows of a block shall not share the sets of L1.
  const int64_t padded = packed.k_blocks * kDepth, q_stride = (padded + 127) / 128 * 128 + 64;
  std::unique_ptr<uint8_t[]> q(new uint8_t[M * q_stride]);
  std::unique_ptr<RowScale[]> x_rows(new RowScale[M]);

  with_element_type(kOp, x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* input = static_cast<const T*>(dense_x.const_data_ptr());
    T* output = static_cast<T*>(out.mutable_data_ptr());
    const Gelu gelu_kernel = gelu();
    quantize_rows(input, M, K, padded, how, q.get(), q_stride,
                  [&](int64_t m, RowScale row) { x_rows[m] = row; });

    // A task is up to 64 columns × up to 96 rows: its weights stay in L2 while its rows pass by.
    constexpr int64_t kTaskRows = 16 * kTile.rows;
    const Int8Tile tile = M > kTile.rows && M <= kTallTile.rows ? kTallTile : kTile;
    const int64_t panels = (N + kColumns - 1) / kColumns;
    const int64_t groups = (panels + tile.panels - 1) / tile.panels;
    const int64_t row_tasks = (M + kTaskRows - 1) / kTaskRows;
    const int64_t task_work =
        std::min(M, kTaskRows) * tile.panels * kColumns * std::max<int64_t>(1, K);
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / task_work);
    torch::stable::parallel_for(0, groups * row_tasks, grain, [&](int64_t begin, int64_t end) {
      // GELU, and other types than float32, are made of finished rows of these.
      static_assert(kTallTile.rows * kTallTile.panels <= kTile.rows * kTile.panels);
      alignas(64) float values[kTile.rows * kTile.panels * kColumns];
      Int8Block block{};
      block.q_stride = q_stride, block.k_blocks = packed.k_blocks;
      block.one_zero = how.kind != Quantization::kAsymmetric;
      block.relu = activation == Activation::kRelu;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first_panel = task / row_tasks * tile.panels;
        const int64_t part = task % row_tasks, n0 = first_panel * kColumns;
        // Evenly: 97 rows as 49 and 48.
        const int64_t first_row = part * M / row_tasks, end_row = (part + 1) * M / row_tasks;
        block.panels = panels_start + first_panel * packed.k_blocks * kColumns * kDepth;
        block.panel_count = (int)std::min<int64_t>(tile.panels, panels - first_panel);
        block.columns = std::min<int64_t>(block.panel_count * kColumns, N - n0);
        block.weight_sums = sums + n0, block.scales = scales + n0;
        block.bias = biases.empty() ? nullptr : biases.data() + n0;
        const int64_t blocks = (end_row - first_row + tile.rows - 1) / tile.rows;
        for (int64_t i = 0; i < blocks; ++i) {
          // Evenly: 8 rows as 4 and 4, not as 6 and 2.
          const int64_t m = first_row + i * (end_row - first_row) / blocks;
          block.count = (int)(first_row + (i + 1) * (end_row - first_row) / blocks - m);
          block.q = q.get() + m * q_stride, block.rows = x_rows.get() + m;
          T* out_rows = output + m * N + n0;
          block.y = values, block.y_stride = block.columns;
          if constexpr (std::is_same_v<T, float>) block.y = out_rows, block.y_stride = N;
          isa.multiply(block);
          for (int r = 0; r < block.count; ++r) {
            float* y = block.y + r * block.y_stride;
            if (activation == Activation::kGelu) gelu_kernel(y, block.columns);
            if constexpr (!std::is_same_v<T, float>)
              std::copy(y, y + block.columns, out_rows + r * N);
          }
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&compressops::cpu::int8_linear));
}
