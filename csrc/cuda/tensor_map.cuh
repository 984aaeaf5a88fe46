// What TMA needs to know of a matrix in global memory. Made on the host for each launch, and passed
// to the kernel as a `const __grid_constant__` parameter.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__

#include <cuda.h>

namespace compressops {

using TensorMap = CUtensorMap;

// Of a matrix whose rows are row_stride elements apart, for copies of box_rows × box_columns
// elements; zeros come where a box reaches outside. `swizzled`: a box's rows are 128 bytes wide,
// and their 16-byte chunks lie where wgmma looks for them, chunk c of row r at c ^ (r % 8). Base
// and row stride are multiples of 16 bytes, rows and columns less than 2^31.
template <class T>
cudaError_t make_tensor_map(Global<const T> matrix, int64_t rows, int64_t columns,
                            int64_t row_stride, int box_rows, int box_columns, bool swizzled,
                            TensorMap* map) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4);
  constexpr CUtensorMapDataType kType = sizeof(T) == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                        : sizeof(T) == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  // Asked of the driver by name, so that the library does not hang on libcuda.so.
  static const auto encode = []() -> decltype(&cuTensorMapEncodeTiled) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * sizeof(T)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, kType, 2, const_cast<void*>(static_cast<const void*>(matrix)), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace compressops

#endif
