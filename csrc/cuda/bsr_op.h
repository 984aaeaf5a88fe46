// What the ops on block-sparse weights on CUDA tensors check and launch alike. Host code only.
//
// What the indices hold is checked by Python once for tensors (ops/bsr.py), because it waits for
// the GPU; the kernels stay within their arrays whatever they hold.
#pragma once

#include <string>
#include <vector>

#include "bsr_linear_launch.cuh"
#include "pack_rows.cuh"
#include "stable_cuda.h"

namespace compressops {

struct BsrBlocks {
  Tensor values, crow, col;  // contiguous, values on 16 bytes
  OptionalTensor row_order;
  int64_t nnz, r, c;
  int64_t rows, columns;  // of the grid of blocks
};

// The kernels read 16 bytes at once; a view may begin anywhere.
inline Tensor on_16_bytes(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  const bool aligned = misalignment(static_cast<const uint8_t*>(dense.const_data_ptr()), 16) == 0;
  return aligned ? dense : torch::stable::clone(dense);
}

inline Tensor checked_index(const char* op, const Tensor& tensor, const char* argument,
                            int64_t length, const Tensor& x) {
  check_operand(op, tensor, argument, "int32", ScalarType::Int, {length}, x);
  return torch::stable::contiguous(tensor);
}

// The blocks of a weight [N, K] in the type of `dtype`.
inline BsrBlocks checked_blocks(const char* op, const Tensor& values, const Tensor& crow_indices,
                                const Tensor& col_indices, int64_t N, int64_t K, const Tensor& x,
                                ScalarType dtype, bool transposed,
                                const OptionalTensor& row_order = std::nullopt) {
  constexpr int64_t kMost = int64_t{1} << 40;
  COMPRESSOPS_CHECK(N >= 0 && N <= kMost, op, "out_features", "from 0 to 2^40", N);
  COMPRESSOPS_CHECK(K >= 0 && K <= kMost, op, "in_features", "from 0 to 2^40", K);
  const bool is_int8 = dtype == ScalarType::Char;
  const int64_t bytes = is_int8 ? 1 : dtype == ScalarType::Float ? 4 : 2;
  bool fits = same_device(values, x) && values.dim() == 3 && values.size(1) > 0 &&
              values.size(2) > 0 && values.size(0) <= 0x7fffffff;
  fits = fits && (is_int8 ? values.scalar_type() == dtype : is_float_dtype(values));
  fits = fits && bsr_fits(values.size(1), values.size(2), bytes, transposed);
  COMPRESSOPS_CHECK(
      fits, op, "values",
      std::string(is_int8 ? "an int8" : "a float") + " tensor [nnz, r, c] on x's device, " +
          (transposed ? "c a multiple of 16 and r" : "r a multiple of 16 and c") + " of 16 bytes",
      values);
  BsrBlocks blocks{};
  blocks.values = on_16_bytes(is_int8 ? values : torch::stable::to(values, dtype));
  blocks.nnz = values.size(0), blocks.r = values.size(1), blocks.c = values.size(2);
  blocks.rows = ceil_div(N, blocks.r), blocks.columns = ceil_div(K, blocks.c);
  blocks.crow = checked_index(op, crow_indices, "crow_indices", blocks.rows + 1, x);
  blocks.col = checked_index(op, col_indices, "col_indices", blocks.nnz, x);
  if (row_order) {
    blocks.row_order = checked_index(op, *row_order, "row_order", blocks.rows, x);
  }
  return blocks;
}

// A matrix [M, K] whose rows can be read 16 bytes at a time.
struct BsrRows {
  Tensor memory;
  int64_t stride, columns;
};

template <class T>
BsrRows bsr_rows(const char* op, const Tensor& x, int64_t M, int64_t K) {
  constexpr int64_t kPiece = 16 / static_cast<int64_t>(sizeof(T));
  // A matrix whose rows are dense is read where it is; all else is copied.
  const bool dense = x.dim() == 2 && (K <= 1 || x.stride(1) == 1) && x.stride(0) >= K;
  const Tensor rows = dense ? x : torch::stable::contiguous(x);
  const int64_t stride = dense ? x.stride(0) : K;
  const T* data = static_cast<const T*>(rows.const_data_ptr());
  if (K % kPiece == 0 && stride % kPiece == 0 && misalignment(data, 16) == 0) {
    return {rows, stride, K};
  }
  const int64_t columns = ceil_div(K, kPiece) * kPiece;
  const Tensor padded = torch::stable::new_empty(rows, {M, columns});
  check_cuda(launch_pack_rows<T, T>(data, stride, M, K, columns, data_of<T>(padded),
                                    multiprocessor_count(rows, op), current_stream(rows, op)),
             op);
  return {padded, columns, columns};
}

inline FloatType float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return FloatType::kHalf;
    case ScalarType::BFloat16:
      return FloatType::kBfloat16;
    default:
      return FloatType::kFloat;
  }
}

inline Tensor new_result(const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(N);
  return torch::stable::new_empty(x, sizes);  // refuses sizes whose product overflows
}

// Fills in what all of them have and launches; `args` has x and what follows the sums.
template <bool kTransposed, bool kWindows = false, class Input>
void multiply_blocks(const char* op, const BsrBlocks& blocks, BsrArgs<Input> args,
                     const Tensor& starts, const Tensor& columns, const Tensor& y) {
  args.rows = kTransposed ? blocks.columns : blocks.rows;
  args.r = blocks.r, args.c = blocks.c;
  args.row_order = data_of<int>(blocks.row_order);
  args.width = bsr_width(args);
  const int64_t cell = int64_t{kBsrCell} * BsrOperands<Input>::kInputs;
  const BsrPlan plan = plan_bsr(args.M, args.width, blocks.nnz * (blocks.r * blocks.c / cell),
                                multiprocessor_count(y, op));
  const cudaStream_t stream = current_stream(y, op);
  OptionalTensor partials, tickets;
  if (plan.splits > 1) {
    // Sums of floats or of integers, of 4 bytes.
    partials = torch::stable::new_empty(y, {plan.partials}, ScalarType::Int);
    tickets = stream_tickets(y, plan.tiles, stream, op);
    args.partials = data_of<typename BsrOperands<Input>::Sum>(*partials);
    args.tickets = data_of<unsigned>(*tickets);
  }
  args.values = static_cast<const Input*>(blocks.values.const_data_ptr());
  args.nnz = blocks.nnz;
  args.starts = static_cast<const int*>(starts.const_data_ptr());
  args.columns = static_cast<const int*>(columns.const_data_ptr());
  args.splits = plan.splits;
  args.y_type = float_type(y);
  args.y = data_of<uint8_t>(y);
  check_cuda(launch_bsr<kTransposed, kWindows>(args, plan, stream), op);
}

// call(x, T{}) with x in the type that both operands are multiplied in.
template <class Call>
void with_common_type(const Tensor& x, const Tensor& values, const Call& call) {
  if (x.scalar_type() == values.scalar_type()) {
    return with_element_type(x, [&](auto element) { call(x, element); });
  }
  call(torch::stable::to(x, ScalarType::Float), float{});
}

inline ScalarType common_dtype(const Tensor& x, const Tensor& values) {
  return x.scalar_type() == values.scalar_type() ? x.scalar_type() : ScalarType::Float;
}

}  // namespace compressops
