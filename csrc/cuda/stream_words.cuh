// Words of streams of bytes that begin anywhere.
#pragma once

#include "device.cuh"
#include "ptx.cuh"

namespace compressops {

// Word `index` of the stream, counted from the aligned address at or before its start, with zeros
// for the bytes outside [begin, end). `shift`: how far before the start that address is.
__device__ __forceinline__ uint32_t load_stream_word(Global<const uint8_t> stream, int shift,
                                                     int64_t index, int64_t begin, int64_t end) {
  const int64_t first = 4 * index - shift;
  if (first >= begin && first + 4 <= end) {
    return load_nc<uint32_t>(view_as<const uint32_t>(stream + first), 0);
  }
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i >= begin && first + i < end) {
      word |= static_cast<uint32_t>(load_nc<uint8_t>(stream, first + i)) << (8 * i);
    }
  }
  return word;
}

}  // namespace compressops
