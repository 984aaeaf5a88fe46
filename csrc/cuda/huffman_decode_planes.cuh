// huffman_decode_planes: huffman_decode, whose symbols become codes of 16 or 32 bits at once.
//
// Each plane that is coded takes a pass. The first one merges what is raw with it, and is the only
// one for floats as they are mostly packed: their planes are read once, their codes written once.
// Each further pass reads the codes again and puts its plane into them.
#pragma once

#include "huffman_decode.cuh"
#include "merge_planes.cuh"

namespace compressops {

// Of `codes`, whose raw planes are set. `coded` has the stream of each plane p whose bit p is in
// `which`; their statuses tell afterwards how it went.
template <class Code>
cudaError_t launch_huffman_decode_planes(MergedCodes<Code> codes,
                                         const HuffmanArgs (&coded)[MergedCodes<Code>::kPlanes],
                                         unsigned which, bool turned, int64_t multiprocessors,
                                         cudaStream_t stream) {
  codes.turned = turned;
  if (which == 0) return launch_merge_planes(codes, stream);
  for (int p = 0; which != 0; ++p) {
    if ((which >> p & 1) == 0) continue;
    which ^= 1u << p;
    codes.coded = p;
    codes.turned = turned && which == 0;
    const cudaError_t error = launch_huffman_decode(coded[p], codes, multiprocessors, stream);
    if (error != cudaSuccess) return error;
    codes.raw = 0;
    codes.begun = true;
  }
  return cudaSuccess;
}

}  // namespace compressops
