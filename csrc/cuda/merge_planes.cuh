// merge_planes: codes of 16 or 32 bits from planes of bytes, one of which may be decoded just now.
//
// A thread takes 16 codes: of each plane five words, as it begins anywhere, and the codes go out 16
// bytes at a time. Traffic: each plane once and the codes once; that is all there is to do.
#pragma once

#include "device.cuh"
#include "stream_words.cuh"

namespace compressops {

constexpr int kMergeThreads = 256;

// Where decoded symbols become codes (a sink of huffman_decode_chunks), Code uint16_t or uint32_t:
// each is the sum of planes[p][i] * 256^p, where a plane may be missing until another pass.
template <class Code>
struct MergedCodes {
  static constexpr int kPlanes = sizeof(Code);
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Code));

  Global<Code> output;                    // [count]
  Global<const uint8_t> planes[kPlanes];  // [count] each
  int64_t count;
  unsigned raw;  // bit p: planes[p] is read
  int coded;     // the plane whose bytes `put` is given; kPlanes for none
  bool begun;    // the output has planes of a pass before
  bool turned;   // the codes are complete then, and are rotated right by one bit

  // How many codes before `begin` 16 bytes of them begin.
  __device__ __forceinline__ int shift(int64_t begin) const {
    return misalignment(output + begin, 16) / static_cast<int>(sizeof(Code));
  }

  // Those [from, to) of the 16 codes at `first`, which lies before the output if from > 0.
  __device__ __forceinline__ void put(int64_t first, int from, int to,
                                      const uint32_t (&four)[4]) const {
    uint32_t codes[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      codes[i] = coded < kPlanes ? (four[i / 4] >> (8 * (i % 4)) & 255u) << (8 * coded) : 0;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if ((raw >> p & 1) == 0) continue;
      const int before = misalignment(planes[p], 4);
      const int64_t at = first + before;  // from an aligned address on; may be negative
      uint32_t low = load_stream_word(planes[p], before, at >> 2, 0, count);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t high = load_stream_word(planes[p], before, (at >> 2) + w + 1, 0, count);
        const uint32_t bytes = __funnelshift_r(low, high, static_cast<unsigned>(at & 3) * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) codes[4 * w + i] |= (bytes >> (8 * i) & 255u) << (8 * p);
        low = high;
      }
    }
    if (begun) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i >= from && i < to) codes[i] |= output[first + i];
      }
    }
    if (turned) {
#pragma unroll
      for (int i = 0; i < 16; ++i) codes[i] = codes[i] >> 1 | (codes[i] & 1u) << (8 * kPlanes - 1);
    }
    if (from > 0 || to < 16) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i >= from && i < to) output[first + i] = static_cast<Code>(codes[i]);
      }
      return;
    }
#pragma unroll
    for (int v = 0; v < kPlanes; ++v) {
      int words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int i = v * kVector + w * kVector / 4;
        words[w] = static_cast<int>(kPlanes == 2 ? codes[i] | codes[i + 1] << 16 : codes[i]);
      }
      view_as<int4>(output + (first + v * kVector))[0] =
          make_int4(words[0], words[1], words[2], words[3]);
    }
  }
};

// Of planes that are all there.
template <class Code>
__global__ void __launch_bounds__(kMergeThreads) merge_planes(MergedCodes<Code> codes) {
  const int64_t first = 16 * (int64_t{blockIdx.x} * kMergeThreads + threadIdx.x) - codes.shift(0);
  if (first >= codes.count) return;
  const uint32_t none[4] = {};
  codes.put(first, static_cast<int>(max(int64_t{0}, -first)),
            static_cast<int>(min(int64_t{16}, codes.count - first)), none);
}

template <class Code>
cudaError_t launch_merge_planes(const MergedCodes<Code>& codes, cudaStream_t stream) {
  if (codes.count == 0) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(codes.count + 15, 16 * kMergeThreads);
  return launch(merge_planes<Code>, dim3(static_cast<unsigned>(blocks)), dim3(kMergeThreads), 0,
                stream, codes);
}

}  // namespace compressops
