// Planes of bytes to codes of 2 or 4 bytes. This header is included by translation units that are
// compiled for different instruction sets, so it defines no function and includes nothing that
// would: a linker may keep the wrong copy of an inline function.
//
// A code takes as many bytes to read as to write and a few instructions a vector, so that memory is
// the limit from the second level of cache on.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

// out[i] = the bytes planes[0][i] (the lowest), planes[1][i] …, rotated right by one bit if
// `turned`. In place of nothing: out overlaps no plane. `past_caches`: it is written to memory
// without being fetched, where it is aligned to vectors.
struct MergePlanesKernels {
  void (*two)(uint16_t* out, const uint8_t* const* planes, int64_t count, bool turned,
              bool past_caches);
  void (*four)(uint32_t* out, const uint8_t* const* planes, int64_t count, bool turned,
               bool past_caches);
};
const MergePlanesKernels& merge_planes_baseline();
const MergePlanesKernels& merge_planes_avx2();
const MergePlanesKernels& merge_planes_avx512();

}  // namespace compressops::cpu
