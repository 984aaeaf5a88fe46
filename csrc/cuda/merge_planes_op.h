// What merge_planes and huffman_decode_planes have in common on CUDA. Host code only.
#pragma once

#include <string>
#include <vector>

#include "merge_planes.cuh"
#include "stable_cuda.h"

namespace compressops {

// Bytes of an element of a result that planes can be merged to, 2 or 4.
inline int64_t merged_bytes(const char* op, const Tensor& out) {
  const bool vector = out.is_cuda() && out.dim() == 1 && out.is_contiguous();
  switch (out.scalar_type()) {
    case ScalarType::Short:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      if (vector) return 2;
      break;
    case ScalarType::Int:
    case ScalarType::Float:
      if (vector) return 4;
      break;
    default:
      break;
  }
  fail_argument(op, "out", "a contiguous CUDA vector of 2 or 4 bytes an element", out);
}

inline void check_each_plane(const char* op, const char* argument,
                             const std::vector<Tensor>& tensors, int64_t planes) {
  COMPRESSOPS_CHECK(static_cast<int64_t>(tensors.size()) == planes, op, argument,
                    std::to_string(planes) + " tensors, as out has bytes an element",
                    static_cast<int64_t>(tensors.size()));
}

inline const uint8_t* raw_plane(const char* op, const Tensor& plane, const Tensor& out) {
  COMPRESSOPS_CHECK(same_device(plane, out) && plane.scalar_type() == ScalarType::Byte &&
                        plane.dim() == 1 && plane.numel() == out.numel() && plane.is_contiguous(),
                    op, "planes",
                    "contiguous uint8 tensors [" + std::to_string(out.numel()) +
                        "] on out's device where they are not coded",
                    plane);
  return static_cast<const uint8_t*>(plane.const_data_ptr());
}

// Of no plane yet.
template <class Code>
MergedCodes<Code> merged_codes(const Tensor& out) {
  MergedCodes<Code> codes = {};
  codes.output = static_cast<Code*>(out.mutable_data_ptr());
  codes.count = out.numel();
  codes.coded = MergedCodes<Code>::kPlanes;
  return codes;
}

}  // namespace compressops
