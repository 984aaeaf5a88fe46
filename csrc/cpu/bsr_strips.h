// Strips of a weight in block-sparse rows that was not packed, or of its transposed: cut for one
// call.
#pragma once

#include "bsr.h"

namespace compressops::cpu {

struct BsrStrips {
  std::vector<int32_t> starts, columns;
  BsrWeight weight;
};

// The stored blocks by columns: of each its row, and its place among the values.
struct BsrByColumns {
  std::vector<int32_t> starts, rows, places;

  explicit BsrByColumns(const BsrBlocks& blocks)
      : starts(blocks.columns + 1), rows(blocks.nnz), places(blocks.nnz) {
    const int32_t *crow = blocks.starts(), *where = blocks.where();
    for (int64_t b = 0; b < blocks.nnz; ++b) ++starts[where[b] + 1];
    for (int64_t j = 0; j < blocks.columns; ++j) starts[j + 1] += starts[j];
    std::vector<int32_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < blocks.rows; ++i)
      for (int32_t b = crow[i]; b < crow[i + 1]; ++b) {
        const int32_t at = next[where[b]]++;
        rows[at] = static_cast<int32_t>(i), places[at] = b;
      }
  }
};

// Strips of W [N, K], or of its transposed, whose values `memory` keeps as 4-byte items: floats, or
// quads of int8. What blocks hold beyond N and K becomes 0: it meets the zeros of a padded panel,
// and would keep a NaN.
inline BsrStrips cut_strips(const BsrLinearKernels& isa, const BsrBlocks& blocks, Element element,
                            int64_t N, int64_t K, int64_t quad, bool transposed, Scratch& memory) {
  const int64_t outs = transposed ? blocks.c : blocks.r, ins = transposed ? blocks.r : blocks.c;
  const int64_t outputs = transposed ? K : N, inputs = transposed ? N : K;
  const int strip = strip_of(outs);
  const int64_t depth = ins / quad, strips = ceil_div(outputs, strip), cuts = outs / strip;
  std::vector<int32_t> starts, across, places;
  if (transposed) {
    BsrByColumns by(blocks);
    starts.swap(by.starts), across.swap(by.rows), places.swap(by.places);
  }
  const int32_t* row_starts = transposed ? starts.data() : blocks.starts();
  const int32_t* row_blocks = transposed ? across.data() : blocks.where();

  BsrStrips out;
  out.starts.resize(strips + 1);
  int64_t total = 0;
  for (int64_t s = 0; s < strips; ++s) {
    total += row_starts[s / cuts + 1] - row_starts[s / cuts];
    COMPRESSOPS_CHECK(total < int64_t{1} << 31, "bsr_linear", "col_indices",
                      "less than 2^31 strips of blocks", total);
    out.starts[s + 1] = static_cast<int32_t>(total);
  }
  out.columns.resize(total);
  const int64_t items = depth * strip;  // of a block's strip
  float* values = memory.get(std::max<int64_t>(1, total * items));
  const char* from = static_cast<const char*>(blocks.values.const_data_ptr());
  const int64_t bytes = quad > 1 ? 1 : element_bytes(element);
  // Of the values, in their own order: from one output to the next, and one input.
  const int64_t row_step = blocks.packed ? 1 : blocks.c, column_step = blocks.packed ? blocks.r : 1;
  const int64_t out_step = transposed ? column_step : row_step;
  const int64_t in_step = transposed ? row_step : column_step;
  torch::stable::parallel_for(
      0, strips, std::max<int64_t>(1, strips * 16384 / (total * items + 1)),
      [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          const int64_t first = row_starts[s / cuts], count = row_starts[s / cuts + 1] - first;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t at = out.starts[s] + i,
                          block = transposed ? places[first + i] : first + i;
            out.columns[at] = row_blocks[first + i];
            float* to = values + at * items;
            const char* corner =
                from + (block * blocks.r * blocks.c + s % cuts * strip * out_step) * bytes;
            const int64_t valid = std::min(ins, inputs - row_blocks[first + i] * ins);
            if (quad > 1) {
              // Whole quads, and then the zeros inside and behind the last.
              isa.pack(corner, Element::kFloat, out_step / quad, strip, depth, to, strip, strip);
              char* quads = reinterpret_cast<char*>(to);
              for (int64_t k = valid; k < ins; ++k)
                for (int o = 0; o < strip; ++o) quads[(k / quad * strip + o) * quad + k % quad] = 0;
              continue;
            }
            if (in_step == 1)
              isa.pack(corner, element, out_step, strip, valid, to, strip, strip);
            else
              isa.copy(corner, element, in_step, 1, valid, strip, to, strip);
            std::fill(to + valid * strip, to + items, 0.0f);
          }
        }
      });
  out.weight = {reinterpret_cast<const char*>(values),
                Element::kFloat,
                strip,
                depth,
                outputs,
                ceil_div(inputs, ins) * depth,
                out.starts.data(),
                out.columns.data()};
  return out;
}

}  // namespace compressops::cpu
