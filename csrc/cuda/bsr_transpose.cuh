// The stored blocks of a weight in the order of their columns. For one translation unit.
#pragma once

#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

// The stored blocks by columns, from their columns sorted and the numbers of the blocks in that
// order: where each of `columns` begins, starts[columns + 1], and the rows of the blocks [nnz].
__global__ void bsr_transpose(Global<const int> crow, Global<const int> sorted,
                              Global<const int64_t> order, int64_t rows, int64_t columns,
                              int64_t nnz, Global<int> starts, Global<int> block_rows) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < columns + 1 + nnz; i += stride) {
    const bool of_column = i <= columns;
    const int64_t key = of_column ? i : load_nc<int64_t>(order, i - columns - 1);
    // Columns below the i-th; rows that end at this block or before.
    int64_t low = 0, high = of_column ? nnz : rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const int64_t value =
          of_column ? load_nc<int>(sorted, middle) : load_nc<int>(crow, middle + 1) - 1;
      if (value < key)
        low = middle + 1;
      else
        high = middle;
    }
    if (of_column) {
      starts[i] = static_cast<int>(low);
    } else {
      block_rows[i - columns - 1] = static_cast<int>(low);
    }
  }
}

constexpr int kBsrTransposeThreads = 256;

inline cudaError_t launch_bsr_transpose(Global<const int> crow, Global<const int> sorted,
                                        Global<const int64_t> order, int64_t rows, int64_t columns,
                                        int64_t nnz, int64_t multiprocessors, Global<int> starts,
                                        Global<int> block_rows, cudaStream_t stream) {
  const int64_t blocks = min(ceil_div<int64_t>(columns + 1 + nnz, kBsrTransposeThreads),
                             8 * max(multiprocessors, int64_t{1}));
  return launch(bsr_transpose, dim3(static_cast<unsigned>(blocks)), dim3(kBsrTransposeThreads), 0,
                stream, crow, sorted, order, rows, columns, nnz, starts, block_rows);
}

}  // namespace compressops
