// What the ops on block-sparse weights share: checks of their indices, strips, and the loop over
// panels of rows and groups of strips.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../check.h"
#include "bsr_linear.h"
#include "elements.h"
#include "workers.h"

namespace compressops::cpu {

// Panels of rows that a thread has at least, if it packs them alone.
constexpr int64_t kPanelsOfThread = 3;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The stored blocks of a weight in block-sparse rows, as a caller gave them.
struct BsrBlocks {
  Tensor values, crow, col;  // contiguous
  bool packed;               // values are [nnz][c / quad][r][quad], not [nnz][r][c]
  int64_t r, c, nnz;
  int64_t rows, columns;  // of the grid of blocks

  const int32_t* starts() const { return static_cast<const int32_t*>(crow.const_data_ptr()); }
  const int32_t* where() const { return static_cast<const int32_t*>(col.const_data_ptr()); }
};

// Outputs of a strip of blocks of r outputs: the largest power of two up to 16 that divides r.
inline int strip_of(int64_t r) {
  int strip = kStrip;
  while (r % strip != 0) strip /= 2;
  return strip;
}

inline Tensor check_index(const char* op, const char* argument, const Tensor& tensor,
                          int64_t length) {
  COMPRESSOPS_CHECK(tensor.is_cpu() && tensor.dim() == 1 &&
                        tensor.scalar_type() == ScalarType::Int && tensor.size(0) == length,
                    op, argument, "a CPU int32 tensor [" + std::to_string(length) + "]", tensor);
  return as_contiguous(tensor);
}

// Indices that no kernel can leave its buffers by. Blocks that are stored twice are added twice.
inline void check_indices(const char* op, const BsrBlocks& blocks) {
  const int32_t *starts = blocks.starts(), *where = blocks.where();
  const std::string form = "ascending from 0 to " + std::to_string(blocks.nnz);
  COMPRESSOPS_CHECK(starts[0] == 0, op, "crow_indices", form, int64_t{starts[0]});
  for (int64_t i = 0; i < blocks.rows; ++i)
    COMPRESSOPS_CHECK(starts[i + 1] >= starts[i], op, "crow_indices", form, int64_t{starts[i + 1]});
  COMPRESSOPS_CHECK(starts[blocks.rows] == blocks.nnz, op, "crow_indices", form,
                    int64_t{starts[blocks.rows]});
  // The sign of one that is negative, or of what is left up to the last: quicker than comparisons,
  // which every call of few rows would notice.
  const uint32_t last = static_cast<uint32_t>(std::min<int64_t>(blocks.columns - 1, INT32_MAX));
  uint32_t signs = 0;
  for (int64_t b = 0; b < blocks.nnz; ++b) {
    const uint32_t column = static_cast<uint32_t>(where[b]);
    signs |= column | (last - column);
  }
  const bool outside = signs >> 31 != 0;
  for (int64_t b = 0; outside && b < blocks.nnz; ++b)
    COMPRESSOPS_CHECK(where[b] >= 0 && where[b] < blocks.columns, op, "col_indices",
                      "from 0 to " + std::to_string(blocks.columns - 1), int64_t{where[b]});
}

// The blocks of a weight [N, K]; `quad` items of int8 go together in packed values, or 1.
inline BsrBlocks check_blocks(const char* op, const Tensor& values, const Tensor& crow_indices,
                              const Tensor& col_indices, int64_t N, int64_t K, int64_t quad) {
  constexpr int64_t kMost = int64_t{1} << 40;
  COMPRESSOPS_CHECK(N >= 0 && N <= kMost, op, "out_features", "from 0 to 2^40", N);
  COMPRESSOPS_CHECK(K >= 0 && K <= kMost, op, "in_features", "from 0 to 2^40", K);
  bool fits = values.is_cpu() && (values.dim() == 3 || values.dim() == 4);
  for (int64_t i = 1; fits && i < values.dim(); ++i) fits = values.size(i) > 0;
  const bool packed = values.dim() == 4;
  if (fits && packed)
    fits = values.size(3) == quad && values.size(2) <= kStrip &&
           strip_of(values.size(2)) == values.size(2);
  fits = fits && (packed || values.size(2) % quad == 0);
  const std::string q = std::to_string(quad);
  COMPRESSOPS_CHECK(fits, op, "values",
                    "a CPU tensor [nnz, r, c], c a multiple of " + q + ", or packed as [nnz, c / " +
                        q + ", r, " + q + "]",
                    values);
  BsrBlocks blocks{};
  blocks.values = as_contiguous(values);
  blocks.packed = packed, blocks.nnz = values.size(0);
  blocks.r = packed ? values.size(2) : values.size(1);
  blocks.c = packed ? values.size(1) * quad : values.size(2);
  blocks.rows = ceil_div(N, blocks.r), blocks.columns = ceil_div(K, blocks.c);
  blocks.crow = check_index(op, "crow_indices", crow_indices, blocks.rows + 1);
  blocks.col = check_index(op, "col_indices", col_indices, blocks.nnz);
  check_indices(op, blocks);
  return blocks;
}

// An order of the rows of blocks changes no result, and is of no use here: a panel of x stays in
// the caches for all strips. It has to be one nevertheless.
inline void check_row_order(const char* op, const std::optional<Tensor>& row_order,
                            const BsrBlocks& blocks) {
  if (!row_order) return;
  const Tensor order = check_index(op, "row_order", *row_order, blocks.rows);
  const int32_t* rows = static_cast<const int32_t*>(order.const_data_ptr());
  std::vector<bool> seen(blocks.rows);
  for (int64_t i = 0; i < blocks.rows; ++i) {
    const bool fits = rows[i] >= 0 && rows[i] < blocks.rows && !seen[rows[i]];
    COMPRESSOPS_CHECK(fits, op, "row_order",
                      "a permutation of 0 to " + std::to_string(blocks.rows - 1),
                      std::to_string(rows[i]) + " at " + std::to_string(i));
    seen[rows[i]] = true;
  }
}

// A weight as the kernels read it: strips of `r` outputs, as BsrStrip says.
struct BsrWeight {
  const char* values;
  Element element;
  int r;
  int64_t depth;
  int64_t outputs, inputs;  // inputs: those of the grid, in items
  const int32_t* starts;    // [strips + 1]
  const int32_t* columns;

  int64_t item_bytes() const { return element_bytes(element); }
  int64_t strips() const { return ceil_div(outputs, r); }
  // Groups are the strips of 16 outputs.
  int strips_of_group() const { return kStrip / r; }
  int64_t groups() const { return ceil_div(outputs, kStrip); }
  int64_t first_block(int64_t group) const {
    return starts[std::min(group * strips_of_group(), strips())];
  }
  BsrStrip strip(int64_t i) const {
    const int64_t first = starts[i];
    return {values + first * depth * r * item_bytes(), columns + first, starts[i + 1] - first,
            depth, r};
  }
  // The first group of the i-th of `parts` parts of equal work; a group is worth a block by itself.
  int64_t part(int64_t i, int64_t parts) const {
    const int64_t total = first_block(groups()) + groups();
    int64_t low = 0, high = groups();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if ((first_block(middle) + middle) * parts < total * i)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

inline BsrWeight packed_weight(const BsrBlocks& blocks, Element element, int64_t outputs,
                               int64_t quad) {
  const int64_t depth = blocks.c / quad;
  return {static_cast<const char*>(blocks.values.const_data_ptr()),
          element,
          static_cast<int>(blocks.r),
          depth,
          outputs,
          blocks.columns * depth,
          blocks.starts(),
          blocks.where()};
}

// Panels of rows of x. All but the last are `width` wide.
struct BsrPanels {
  int64_t M, width, count;

  // Their count is a multiple of `multiple`, as nearly as M allows.
  BsrPanels(const BsrLinearKernels& isa, const BsrWeight& weight, int64_t M, int64_t multiple = 1)
      : M(M), width(kStrip), count(ceil_div(M, kStrip)) {
    if (weight.r < kStrip) return;  // rows are across the vectors there
    const int64_t least = ceil_div(ceil_div(M, isa.most_rows), multiple) * multiple;
    width = wide_enough(ceil_div(M, least));
    count = ceil_div(M, width);
  }
  static int64_t wide_enough(int64_t rows) { return rows <= 8 ? rows : (rows + 1) / 2 * 2; }
  int64_t rows(int64_t panel) const { return std::min(width, M - panel * width); }
  int64_t width_of(int64_t panel, const BsrWeight& weight) const {
    return weight.r < kStrip ? kStrip : wide_enough(rows(panel));
  }
};

// Strips of a single row that are multiplied at a time: between them no other code lets the stream
// of blocks wait.
constexpr int64_t kStripsOfRow = 32;

// sums [strip][16] of a single row and some groups of one strip each.
inline void multiply_row(const BsrLinearKernels& isa, const BsrWeight& weight, int64_t group,
                         int64_t count, const float* row, float* sums) {
  BsrStrip strips[kStripsOfRow];
  for (int64_t i = 0; i < count; ++i) strips[i] = weight.strip(group + i);
  isa.multiply_row(strips, count, weight.element, row, sums);
}

// sums [m][16] of a panel's rows and a group's outputs.
inline void multiply_group(const BsrLinearKernels& isa, const BsrWeight& weight, int64_t group,
                           const float* panel, int64_t width, float* sums) {
  if (weight.r == kStrip)
    return isa.multiply(weight.strip(group), weight.element, panel, static_cast<int>(width), sums);
  alignas(64) float transposed[kStrip * kStrip] = {};
  static thread_local Scratch own;
  const int64_t first = group * weight.strips_of_group();
  const int64_t end = std::min(first + weight.strips_of_group(), weight.strips());
  for (int64_t i = first; i < end; ++i) {
    BsrStrip strip = weight.strip(i);
    if (weight.element != Element::kFloat) {
      const int64_t items = strip.blocks * strip.depth * strip.r;
      float* widened = own.get(items);
      isa.copy(strip.values, weight.element, items, 1, 1, items, widened, items);
      strip.values = widened;
    }
    isa.multiply_narrow(strip, panel, transposed + (i - first) * weight.r * kStrip);
  }
  isa.pack(transposed, Element::kFloat, kStrip, kStrip, kStrip, sums, kStrip, kStrip);
}

// Multiplies M rows of x by a weight. pack(m, rows, begin, end, panel, width) makes the items
// [begin, end) of a panel of the rows from m on; `x`, if not null, is the one panel already.
// finish(m, rows, n, columns, sums) takes the sums of `columns` outputs from n on, more than 16
// only of one row.
//
// A thread packs the panels that it multiplies, so that they come from its L2. Where there are few
// panels, all threads pack them, and share the groups of strips.
template <typename Pack, typename Finish>
void bsr_multiply(const BsrLinearKernels& isa, const BsrWeight& weight, int64_t M, const float* x,
                  Pack&& pack, Finish&& finish) {
  constexpr int64_t kPiece = 512;  // items that are packed as one task
  const int64_t threads = torch::stable::get_num_threads(), groups = weight.groups();
  // A thread is worth starting for some 10 µs. A vector of the weight is multiplied with a row in a
  // cycle, and takes 3 to come from L3.
  const int64_t vectors = weight.first_block(groups) * weight.depth * weight.r / kStrip;
  const bool alone = threads == 1 || vectors * std::max<int64_t>(M, 3) < 50000;
  const BsrPanels few(isa, weight, M);
  const bool own = alone || few.count >= kPanelsOfThread * threads;
  const BsrPanels panels = own && !alone ? BsrPanels(isa, weight, M, threads) : few;
  const int64_t panel_items = weight.inputs * panels.width;
  const int64_t pieces = ceil_div(weight.inputs, kPiece);
  const auto pack_piece = [&](int64_t panel, int64_t piece, float* to) {
    const int64_t begin = piece * kPiece, width = panels.width_of(panel, weight);
    pack(panel * panels.width, panels.rows(panel), begin, std::min(begin + kPiece, weight.inputs),
         to + begin * width, width);
  };
  const auto multiply = [&](int64_t panel, const float* items, int64_t group, int64_t end) {
    alignas(64) float sums[kStripsOfRow * kStrip];
    const int64_t width = panels.width_of(panel, weight);
    const int64_t most = weight.r == kStrip && width == 1 ? kStripsOfRow : 1;
    for (int64_t count; group < end; group += count) {
      count = std::min(most, end - group);
      if (most > 1)
        multiply_row(isa, weight, group, count, items, sums);
      else
        multiply_group(isa, weight, group, items, width, sums);
      finish(panel * panels.width, panels.rows(panel), group * kStrip,
             std::min(count * kStrip, weight.outputs - group * kStrip), sums);
    }
  };
  static thread_local Scratch scratch;
  if (own) {
    const auto task = [&](int64_t panel) {
      float* memory = x == nullptr ? scratch.get(panel_items + kStrip) : nullptr;
      for (int64_t piece = 0; x == nullptr && piece < pieces; ++piece)
        pack_piece(panel, piece, memory);
      multiply(panel, x == nullptr ? memory : x, 0, groups);
    };
    if (!alone) return for_each(panels.count, task);
    for (int64_t panel = 0; panel < panels.count; ++panel) task(panel);
    return;
  }
  float* memory = x == nullptr ? scratch.get(panels.count * panel_items + kStrip) : nullptr;
  if (x == nullptr)
    for_each(panels.count * pieces, [&](int64_t i) {
      pack_piece(i / pieces, i % pieces, memory + i / pieces * panel_items);
    });
  const int64_t parts =
      std::clamp<int64_t>(8 * threads / std::max<int64_t>(1, panels.count), 1, groups);
  for_each(panels.count * parts, [&](int64_t i) {
    const int64_t panel = i / parts, part = i % parts;
    multiply(panel, x == nullptr ? memory + panel * panel_items : x, weight.part(part, parts),
             weight.part(part + 1, parts));
  });
}

}  // namespace compressops::cpu
