// The element type of a tensor, as the kernels know it.
#pragma once

#include "../check.h"
#include "element.h"

namespace compressops::cpu {

inline Element element_of(const char* op, const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      fail_argument(op, argument, "of dtype float32, float16 or bfloat16", tensor);
  }
}

inline int64_t element_bytes(Element element) { return element == Element::kFloat ? 4 : 2; }

}  // namespace compressops::cpu
