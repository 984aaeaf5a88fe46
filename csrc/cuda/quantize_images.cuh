// Activation quantization of images: each to int8 by one scale, as ops/int8_conv2d.py defines it
// and bit for bit, channels last.
//
// An image is too large for one block (quantize_rows gives a row to one), and may be the only one.
// So kernel 1 finds the ranges of its parts, and every block of kernel 2 those of the whole image
// from them: no atomics, and nothing that would have to be set to zero before.
#pragma once

#include "device.cuh"
#include "quantize_rows.cuh"
#include "warp.cuh"

namespace compressops {

// Elements of an image that a block finds the range of, at least; and the most parts of an image.
constexpr int64_t kRangeElements = 16384;
constexpr int64_t kMaxRangeParts = 128;

inline int64_t range_parts(int64_t elements) {
  const int64_t parts = ceil_div(elements, kRangeElements);
  return parts < kMaxRangeParts ? parts : kMaxRangeParts;
}

// Images as codes: [N][pixels + 1][groups][channels of a group, padded to `depth` with what means
// 0]. The pixel after the last is the padding's, and means 0 too.
struct ImageCodes {
  int64_t N, pixels, groups, channels;  // channels: of a group
  int depth;                            // 4 or 16

  __host__ __device__ int64_t chunks() const { return ceil_div<int64_t>(channels, depth); }
  __host__ __device__ int64_t pixel_bytes() const { return groups * chunks() * depth; }
  __host__ __device__ int64_t image_bytes() const { return (pixels + 1) * pixel_bytes(); }
};

template <class T>
struct QuantizeImagesArgs {
  ImageCodes codes;
  Global<const T> x;  // images without gaps, channels first or last
  int64_t image_stride, channel_stride, pixel_stride;
  int64_t parts;            // of an image, for its range
  Global<unsigned> ranges;  // scratch [N, parts, 2]
  Global<int8_t> q;         // codes
  Global<float> x_scales;   // [N]
  RowZeros x_zeros;         // zeros: [N], or null if symmetric
};

constexpr int kQuantizeImagesThreads = 128;
// Chunks that a thread quantizes: the range of the image is read for all of them once.
constexpr int kChunksPerThread = 4;

template <class T, RowScaling kScaling>
__global__ void __launch_bounds__(kQuantizeImagesThreads, 8)
    image_ranges(QuantizeImagesArgs<T> args, bool aligned) {
  constexpr int kSides = kScaling == RowScaling::kAsymmetric ? 2 : 1;
  constexpr int kWarps = kQuantizeImagesThreads / kWarpSize;
  COMPRESSOPS_SHARED_ARRAY(unsigned, warp_bits, kWarps* kSides);
  const int64_t count = args.codes.pixels * args.codes.groups * args.codes.channels;
  const int64_t span = padded_to_16(ceil_div(count, args.parts));
  for (int64_t item = blockIdx.x; item < args.codes.N * args.parts; item += gridDim.x) {
    const int64_t image = item / args.parts, first = item % args.parts * span;
    unsigned bits[2] = {0, 0};
    widen_range<T, kQuantizeImagesThreads, kSides>(static_cast<int>(threadIdx.x),
                                                   args.x + image * args.image_stride, first,
                                                   min(first + span, count), aligned, bits);
    block_range<kWarps, kSides>(warp_bits, bits);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) args.ranges[2 * item + side] = bits[side];
    }
  }
}

template <class T, int kDepth, RowScaling kScaling>
__global__ void __launch_bounds__(kQuantizeImagesThreads, 6)
    quantize_images(QuantizeImagesArgs<T> args, bool aligned) {
  constexpr int kSides = kScaling == RowScaling::kAsymmetric ? 2 : 1;
  constexpr int kBlockChunks = kQuantizeImagesThreads * kChunksPerThread;
  const ImageCodes& codes = args.codes;
  const int64_t chunks = codes.chunks(), pixel_chunks = codes.groups * chunks;
  const int64_t image_chunks = (codes.pixels + 1) * pixel_chunks;
  const int64_t blocks = ceil_div<int64_t>(image_chunks, kBlockChunks);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;

  for (int64_t item = blockIdx.x; item < codes.N * blocks; item += gridDim.x) {
    const int64_t image = item / blocks, first = item % blocks * kBlockChunks;
    unsigned bits[2] = {0, 0};
    for (int64_t part = lane; part < args.parts; part += kWarpSize) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        const unsigned other = args.ranges[2 * (image * args.parts + part) + side];
        bits[side] = max(bits[side], other);
      }
    }
#pragma unroll
    for (int side = 0; side < kSides; ++side) bits[side] = warp_max(bits[side]);
    const RowCodes how = row_codes<kScaling>(bits[0], bits[1], args.x_zeros);
    if (first == 0 && thread == 0) {
      args.x_scales[image] = how.scale;
      if constexpr (kScaling != RowScaling::kSymmetric) args.x_zeros.zeros[image] = how.zero;
    }
    for (int i = 0; i < kChunksPerThread; ++i) {
      const int64_t index = first + i * kQuantizeImagesThreads + thread;
      if (index >= image_chunks) break;
      // Neighbouring threads read neighbouring elements: of a pixel, or of a channel.
      const bool last = args.channel_stride == 1;
      const int64_t pixel = last ? index / pixel_chunks : index % (codes.pixels + 1);
      const int64_t chunk = last ? index % pixel_chunks : index / (codes.pixels + 1);
      const int64_t group = chunk / chunks, c = chunk % chunks * kDepth;
      const int64_t count = min(codes.channels - c, int64_t{kDepth});
      float values[16] = {};  // the padding's pixel, and channels past the last, stay 0
      if (pixel < codes.pixels) {
        const Global<const T> from =
            args.x + (image * args.image_stride + pixel * args.pixel_stride +
                      (group * codes.channels + c) * args.channel_stride);
        if (kDepth == 16 && last) {
          load_16_floats<T>(from, count, aligned, values);
        } else {
#pragma unroll
          for (int k = 0; k < kDepth; ++k) {
            if (k < count) values[k] = to_float(load_nc<T>(from, k * args.channel_stride));
          }
        }
      }
      unsigned packed[kDepth / 4];
#pragma unroll
      for (int word = 0; word < kDepth / 4; ++word) packed[word] = quantize_word(values, word, how);
      const Global<int8_t> to =
          args.q + (image * codes.image_bytes() + pixel * codes.pixel_bytes() + chunk * kDepth);
      if constexpr (kDepth == 16) {
        view_as<int4>(to)[0] = make_int4(static_cast<int>(packed[0]), static_cast<int>(packed[1]),
                                         static_cast<int>(packed[2]), static_cast<int>(packed[3]));
      } else {
        view_as<unsigned>(to)[0] = packed[0];
      }
    }
  }
}

// `max_blocks` bounds both grids.
template <class T, RowScaling kScaling>
cudaError_t launch_quantize_images(const QuantizeImagesArgs<T>& args, cudaStream_t stream,
                                   int64_t max_blocks = 0x7fffffff) {
  const auto blocks = [&](int64_t items) {
    return dim3(static_cast<unsigned>(items < max_blocks ? items : max_blocks));
  };
  const ImageCodes& codes = args.codes;
  // 16 elements at a time: of an image, and of a pixel.
  const auto aligned = [&](int64_t stride) { return stride * int64_t{sizeof(T)} % 16 == 0; };
  const bool images = misalignment(args.x, 16) == 0 && aligned(args.image_stride);
  const bool pixels = images && aligned(args.pixel_stride) && aligned(codes.channels);
  const cudaError_t error = launch(image_ranges<T, kScaling>, blocks(codes.N * args.parts),
                                   dim3(kQuantizeImagesThreads), 0, stream, args, images);
  if (error != cudaSuccess) return error;
  const int64_t chunks = (codes.pixels + 1) * codes.groups * codes.chunks();
  const int64_t items =
      codes.N * ceil_div<int64_t>(chunks, kQuantizeImagesThreads * kChunksPerThread);
  return launch(
      codes.depth == 16 ? quantize_images<T, 16, kScaling> : quantize_images<T, 4, kScaling>,
      blocks(items), dim3(kQuantizeImagesThreads), 0, stream, args, pixels);
}

}  // namespace compressops
