// What the runners of the products with block-sparse weights share: buffers of a Python test, and a
// product on them.
#pragma once

#include "bsr_linear_launch.cuh"
#include "bsr_transpose.cuh"
#include "runner.h"
#include "scratch.h"

namespace {

using namespace compressops;
using cuda_on_cpu::Scratch;

constexpr int64_t kMultiprocessors = 2;

struct Buffers {
  int64_t M, N, K, x_row_stride, nnz, r, c, splits, kernel, activation, y_type, scaling;
  const void *x, *values;
  const int *crow, *columns;
  const int* sorted;  // if transposed: the columns, sorted, and the blocks' order
  const int64_t* order;
  const float* bias;
  const float* scales;  // of int8 and the rest
  const int* weight_sums;
  const float* x_scale;
  const int8_t* x_zero;
  void* y;
  const int* row_order;
};

template <class Input, bool kTransposed, bool kWindows = false>
cudaError_t run(const Buffers& b, BsrArgs<Input> args) {
  using Sum = typename BsrOperands<Input>::Sum;
  const int64_t rows = ceil_div(kTransposed ? b.K : b.N, b.r);
  const int64_t columns = ceil_div(kTransposed ? b.N : b.K, b.c);
  const Global<const int> crow(b.crow, rows + 1, "crow_indices");
  const Scratch<int> starts(columns + 1, "starts"), block_rows(b.nnz, "block_rows");
  const Global<const int64_t> order(b.order, b.nnz, "order");
  if (kTransposed) {
    launch_bsr_transpose(crow, Global<const int>(b.sorted, b.nnz, "sorted"), order, rows, columns,
                         b.nnz, kMultiprocessors, starts.array(), block_rows.array(), nullptr);
  }
  const int64_t cells = b.nnz * (b.r * b.c / (kBsrCell * BsrOperands<Input>::kInputs));
  args.N = b.N;
  args.r = b.r;
  args.rows = kTransposed ? columns : rows;
  if (b.row_order) args.row_order = Global<const int>(b.row_order, args.rows, "row_order");
  args.width = bsr_width(args);
  const BsrPlan plan = plan_bsr(b.M, args.width, cells, kMultiprocessors,
                                static_cast<BsrKernel>(b.kernel), b.splits);
  const Scratch<Sum> partials(plan.partials, "partials");
  const Scratch<unsigned> tickets(plan.tiles, "tickets");
  for (int64_t i = 0; i < plan.tiles; ++i) tickets.array()[i] = 0;
  // An earlier launch may have left the right ones there.
  for (int64_t i = 0; i < plan.partials; ++i) partials.array()[i] = static_cast<Sum>(1e9f);
  args.M = b.M;
  args.K = b.K;
  args.values =
      Global<const Input>(static_cast<const Input*>(b.values), b.nnz * b.r * b.c, "values");
  args.nnz = b.nnz;
  args.c = b.c;
  args.starts = kTransposed ? Global<const int>(starts.array()) : crow;
  args.columns = kTransposed ? Global<const int>(block_rows.array())
                             : Global<const int>(b.columns, b.nnz, "col_indices");
  args.order = order;
  if (b.bias) args.bias = Global<const float>(b.bias, b.N, "bias");
  args.activation = static_cast<Activation>(b.activation);
  args.splits = plan.splits;
  args.partials = partials.array();
  args.tickets = tickets.array();
  args.y_type = static_cast<FloatType>(b.y_type);
  args.y = Global<uint8_t>(static_cast<uint8_t*>(b.y), b.M * b.N * (b.y_type == 0 ? 4 : 2), "y");
  const cudaError_t error = launch_bsr<kTransposed, kWindows>(args, plan, nullptr);
  for (int64_t i = 0; i < plan.tiles; ++i) {
    if (tickets.array()[i] != 0) throw cuda_on_cpu::Error("a ticket is left for the next launch");
  }
  return error;
}

}  // namespace
