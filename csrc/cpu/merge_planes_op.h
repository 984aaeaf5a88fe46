// What the operators merge_planes and huffman_decode_planes have in common.
#pragma once

#include "../check.h"
#include "merge_planes.h"

namespace compressops::cpu {

const MergePlanesKernels& merge_planes_kernels();

// Bytes of an element of a result that planes can be merged to, 2 or 4; of any other tensor 0.
int64_t merged_bytes(const Tensor& out);

}  // namespace compressops::cpu
