// Element types of the kernels. Like int8_linear.h, this header defines no function.
#pragma once

namespace compressops::cpu {

enum class Element { kFloat, kHalf, kBFloat16 };

}  // namespace compressops::cpu
