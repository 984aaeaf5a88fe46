// bsr_linear_grad_values on a CPU: the stored blocks of grad.T · x. A block's columns, 16 at a
// time, of all rows of x are a strip of depth M; its outputs of grad are the panel; so that the
// kernel is that of bsr_linear. Of blocks of few columns the two change sides.
#include <torch/csrc/stable/library.h>

#include "bsr.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "bsr_linear_grad_values";

// The columns of a matrix [M][C] cut into blocks of `size`, and those into pieces of up to `most`.
struct Pieces {
  int64_t C, size, most;

  int64_t per_block() const { return ceil_div(size, most); }
  int64_t count() const { return ceil_div(C, size) * per_block(); }
  int64_t inside(int64_t piece) const { return piece % per_block() * most; }
  int64_t begin(int64_t piece) const { return piece / per_block() * size + inside(piece); }
  // Columns of it within the block, and within the matrix.
  int64_t width(int64_t piece) const { return std::min(most, size - inside(piece)); }
  int64_t valid(int64_t piece) const {
    return std::clamp<int64_t>(C - begin(piece), 0, width(piece));
  }
};

// Operands and result of one call, in memory.
struct Operands {
  const BsrBlocks& blocks;
  Element element;
  int64_t M, N, K;
  const char *grads, *inputs;
  float* result;

  // Rows from m on of the columns of a piece of grad or of x, as [depth][row] with zeros behind.
  void copy(const BsrLinearKernels& isa, const char* from, const Pieces& pieces, int64_t piece,
            int64_t m, int64_t depth, int64_t row, float* to) const {
    std::fill(to, to + row * depth, 0.0f);
    from += (m * pieces.C + pieces.begin(piece)) * element_bytes(element);
    isa.copy(from, element, pieces.C, 1, depth, pieces.valid(piece), to, row);
  }
};

// Blocks of up to 8 columns, and more outputs, would leave most of a strip of columns empty. Strips
// are outputs of grad instead, and the stored columns of a row of blocks are gathered from x for
// panels.
void few_columns(const BsrLinearKernels& isa, const Operands& op) {
  const BsrBlocks& blocks = op.blocks;
  const int32_t *starts = blocks.starts(), *where = blocks.where();
  const int64_t c = blocks.c, K = op.K;
  const Pieces strips{op.N, blocks.r, kStrip};
  // Rows of x at a time: all of their columns stay in L2, for all rows of blocks.
  const int64_t chunk = std::clamp<int64_t>((int64_t{128} << 10) / K, 32, 512);
  const bool floats = op.element == Element::kFloat;
  static thread_local Scratch shared;
  float* memory = shared.get(std::min(chunk, op.M) * (strips.count() * kStrip + (floats ? 0 : K)));
  for (int64_t m = 0; m < op.M; m += chunk) {
    const int64_t depth = std::min(chunk, op.M - m);
    const char* rows = op.inputs + m * K * element_bytes(op.element);
    float* widened = memory + strips.count() * kStrip * depth;
    for_each(strips.count(), [&](int64_t piece) {
      op.copy(isa, op.grads, strips, piece, m, depth, kStrip, memory + piece * kStrip * depth);
    });
    if (!floats) isa.copy(rows, op.element, K, 1, depth, K, widened, K);
    const float* x = floats ? reinterpret_cast<const float*>(rows) : widened;
    for_each(blocks.rows, [&](int64_t row) {
      alignas(64) float sums[2 * kStrip * kStrip];
      int64_t columns[2 * kStrip];
      static thread_local Scratch own;
      float* panel = own.get(isa.most_rows * depth);
      const int32_t origin = 0;
      const int64_t end = starts[row + 1] * c;
      for (int64_t first = starts[row] * c; first < end; first += isa.most_rows) {
        const int64_t count = std::min<int64_t>(isa.most_rows, end - first);
        const int64_t width = BsrPanels::wide_enough(count);
        // In the place of one that does not exist stands any: nobody takes its sums.
        for (int64_t j = 0; j < width; ++j) {
          const int64_t at = std::min(first + j, end - 1), column = where[at / c] * c + at % c;
          columns[j] = column < K ? column : 0;
        }
        for (int64_t i = 0; i < depth; ++i)
          for (int64_t j = 0; j < width; ++j) panel[i * width + j] = x[i * K + columns[j]];
        for (int64_t i = 0; i < strips.per_block(); ++i) {
          const int64_t piece = row * strips.per_block() + i;
          const BsrStrip outputs{memory + piece * kStrip * depth, &origin, 1, depth, kStrip};
          isa.multiply(outputs, Element::kFloat, panel, static_cast<int>(width), sums);
          for (int64_t j = 0; j < count; ++j) {
            const int64_t block = (first + j) / c, inside = (first + j) % c;
            if (where[block] * c + inside >= K) continue;
            float* values = op.result + (block * blocks.r + strips.inside(piece)) * c + inside;
            for (int64_t n = 0; n < strips.valid(piece); ++n) values[n * c] += sums[j * kStrip + n];
          }
        }
      }
    });
  }
}

Tensor bsr_linear_grad_values(const Tensor& grad, const Tensor& x, const Tensor& crow_indices,
                              const Tensor& col_indices, std::vector<int64_t> block_size) {
  COMPRESSOPS_CHECK(grad.is_cpu() && grad.dim() >= 1, kOp, "grad", "a CPU tensor [..., N]", grad);
  const Element element = element_of(kOp, grad, "grad");
  bool fits = x.is_cpu() && x.scalar_type() == grad.scalar_type() && x.dim() == grad.dim();
  for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) fits = x.size(i) == grad.size(i);
  COMPRESSOPS_CHECK(fits, kOp, "x", "a CPU tensor [..., K] of grad's dtype, with as many rows", x);
  COMPRESSOPS_CHECK(block_size.size() == 2, kOp, "block_size", "two integers from 1 on",
                    std::to_string(block_size.size()) + " integers");
  for (int64_t side : block_size)
    COMPRESSOPS_CHECK(side >= 1 && side <= 1 << 30, kOp, "block_size",
                      "two integers from 1 to 2^30", side);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  const int64_t N = grad.size(grad.dim() - 1), K = x.size(x.dim() - 1);
  BsrBlocks blocks{};
  blocks.r = block_size[0], blocks.c = block_size[1];
  blocks.rows = ceil_div(N, blocks.r), blocks.columns = ceil_div(K, blocks.c);
  blocks.nnz = col_indices.dim() == 1 ? col_indices.size(0) : 0;
  blocks.crow = check_index(kOp, "crow_indices", crow_indices, blocks.rows + 1);
  blocks.col = check_index(kOp, "col_indices", col_indices, blocks.nnz);
  check_indices(kOp, blocks);
  Tensor out = torch::stable::new_zeros(x, {blocks.nnz, blocks.r, blocks.c}, ScalarType::Float);
  if (out.numel() == 0 || M == 0) return out;

  const BsrLinearKernels& isa = bsr_linear_kernels();
  const Tensor dense_grad = as_contiguous(grad), dense_x = as_contiguous(x);
  const char* grads = static_cast<const char*>(dense_grad.const_data_ptr());
  const char* inputs = static_cast<const char*>(dense_x.const_data_ptr());
  float* result = static_cast<float*>(out.mutable_data_ptr());
  const Operands operands{blocks, element, M, N, K, grads, inputs, result};
  if (2 * blocks.c <= kStrip && blocks.c < blocks.r) {
    few_columns(isa, operands);
    return out;
  }
  const int32_t *starts = blocks.starts(), *where = blocks.where();
  // Evenly: 32 outputs as 16 and 16, not as 24 and 8.
  const int64_t tiles = ceil_div(blocks.r, isa.most_rows);
  const int64_t width = BsrPanels::wide_enough(ceil_div(blocks.r, tiles));
  const Pieces panels{N, blocks.r, width}, strips{K, blocks.c, kStrip};
  // Rows at a time: a strip and a panel stay in L1 or L2, all of them in L3.
  const int64_t row_floats = panels.count() * width + strips.count() * kStrip;
  const int64_t chunk = std::clamp<int64_t>((int64_t{2} << 20) / row_floats, 64, 512);
  static thread_local Scratch shared;
  float* memory = shared.get(std::min(chunk, M) * row_floats + kStrip);
  for (int64_t m = 0; m < M; m += chunk) {
    const int64_t depth = std::min(chunk, M - m);
    float* x_strips = memory + panels.count() * width * depth;
    for_each(panels.count() + strips.count(), [&](int64_t i) {
      const bool of_grad = i < panels.count();
      const Pieces& pieces = of_grad ? panels : strips;
      const int64_t piece = of_grad ? i : i - panels.count(), row = of_grad ? width : kStrip;
      operands.copy(isa, of_grad ? grads : inputs, pieces, piece, m, depth, row,
                    (of_grad ? memory : x_strips) + piece * row * depth);
    });
    for_each(blocks.rows, [&](int64_t row) {
      alignas(64) float sums[2 * kStrip * kStrip];
      const int32_t origin = 0;
      for (int64_t block = starts[row]; block < starts[row + 1]; ++block)
        for (int64_t i = 0; i < panels.per_block(); ++i)
          for (int64_t j = 0; j < strips.per_block(); ++j) {
            const int64_t panel = row * panels.per_block() + i;
            const int64_t strip = where[block] * strips.per_block() + j;
            const BsrStrip columns{x_strips + strip * kStrip * depth, &origin, 1, depth, kStrip};
            isa.multiply(columns, Element::kFloat, memory + panel * width * depth,
                         static_cast<int>(width), sums);
            float* to = result + (block * blocks.r + panels.inside(panel)) * blocks.c +
                        strips.inside(strip);
            for (int64_t n = 0; n < panels.valid(panel); ++n)
              for (int64_t k = 0; k < strips.valid(strip); ++k)
                to[n * blocks.c + k] += sums[n * kStrip + k];
          }
    });
  }
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("bsr_linear_grad_values", TORCH_BOX(&compressops::cpu::bsr_linear_grad_values));
}
