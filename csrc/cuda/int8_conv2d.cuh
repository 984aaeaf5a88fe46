// int8_conv2d: y[n, k, oh, ow] = activation((Σ q[n, window] · weight[k] − x_zero[n] ·
// weight_sum[k]) · x_scale[n] · weight_scale[k] + bias[k])
//
// Two kernels quantize the images to int8, channels last, a group's channels padded to 16 or 4
// (quantize_images.cuh); the third reads windows of those codes where they lie. What a window
// reaches outside the image is read from one pixel of padding behind it: its codes are the zero
// point, so that the sum over the whole filter is what the zero point is taken off by, everywhere.
// The third kernel is one of
//   tile      an implicit GEMM on the tensor cores (int8_tile.cuh): rows are output pixels, columns
//             the output channels of a group, and K goes by in chunks of 16 channels of a tap; each
//             chunk of a window is one cp.async from wherever its pixel lies.
//   panels    for small groups, which would leave most of a tile empty: a thread sums 4 output
//             channels of a pixel with dp4a;
//   channels  for groups of one input and one output channel: a thread sums 4 groups of a pixel.
// Traffic is that of the codes (N · H · W · C bytes, written once, read R · S / stride² times, from
// L1 and L2 mostly) beside x and y themselves; a 3 × 3 convolution of 64 to 64 channels does
// 1152 operations for each byte of its codes, which keeps the tensor cores the limit there.
#pragma once

#include "activation.cuh"
#include "device.cuh"
#include "int8_tile.cuh"
#include "ptx.cuh"
#include "quantize_images.cuh"
#include "tiles.cuh"

namespace compressops {

// How a weight is packed: [groups, ceil(K / panel), R, S, ceil(C / depth), panel, depth], with K
// and C of a group; kChannels has all its channels in one group of depth 1.
enum class Int8Conv2dForm : int { kTile, kPanels, kChannels };

__host__ __device__ constexpr int form_panel(Int8Conv2dForm form) {
  return form == Int8Conv2dForm::kTile ? 1 : 16;
}
__host__ __device__ constexpr int form_depth(Int8Conv2dForm form) {
  return form == Int8Conv2dForm::kTile ? 16 : form == Int8Conv2dForm::kPanels ? 4 : 1;
}

// Input times output channels of a group from which on it makes enough of a matrix for tiles; the
// same as in ops/int8_conv2d.py.
constexpr int64_t kInt8Conv2dMatrix = 256;

// The kernel of a weight in the form kTile. The tests force each.
enum class Int8Conv2dKernel : int { kAuto = -1, kTile64, kTile128 };

struct Int8Conv2dShape {
  int64_t N, groups, C, K;  // C and K: of a group
  // Rows and columns, padding included, are fewer than 2^31: the launch refuses others.
  int H, W, OH, OW, R, S;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Int8Conv2dForm form;

  __host__ __device__ int64_t in_pixels() const { return int64_t{H} * W; }
  __host__ __device__ int64_t out_pixels() const { return int64_t{OH} * OW; }

  ImageCodes codes() const {
    const bool channels = form == Int8Conv2dForm::kChannels;
    return {N, in_pixels(), channels ? 1 : groups, channels ? groups : C,
            form == Int8Conv2dForm::kTile ? 16 : 4};
  }
  // Bytes of the packed weight.
  int64_t weight_bytes() const {
    const int panel = form_panel(form), depth = form_depth(form);
    const bool channels = form == Int8Conv2dForm::kChannels;
    const int64_t panels = ceil_div<int64_t>(channels ? groups : K, panel);
    return (channels ? 1 : groups) * panels * R * S * ceil_div<int64_t>(C, depth) * panel * depth;
  }
};

template <class T>
struct Int8Conv2dArgs {
  Int8Conv2dShape shape;
  QuantizeImagesArgs<T> input;        // q is a whole vector longer than the codes
  Global<const int8_t> weight;        // as `shape.form` packs it, 16-byte aligned
  Global<const float> weight_scales;  // [groups * K]
  Global<const int> weight_sums;      // [groups * K], read where there are zero points
  Global<const float> bias;           // [groups * K] or null
  Activation activation;
  RowScaling scaling;
  Global<T> y;  // [N, groups * K, OH, OW], channels last if `y_last`
  bool y_last;
};

// Packs [groups * K, C, R, S], one thread a byte.
__global__ void int8_conv2d_pack(Int8Conv2dShape shape, Global<const int8_t> weight,
                                 Global<int8_t> packed, int64_t bytes) {
  const int panel = form_panel(shape.form), depth = form_depth(shape.form);
  const int64_t taps = int64_t{shape.R} * shape.S;
  // Channels of their own are the output channels of one group.
  const int64_t K = shape.form == Int8Conv2dForm::kChannels ? shape.groups : shape.K;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= bytes) return;
  int64_t rest = index;
  const auto digit = [&](int64_t radix) {
    const int64_t value = rest % radix;
    rest /= radix;
    return value;
  };
  const int64_t in_depth = digit(depth), in_panel = digit(panel);
  const int64_t c = digit(ceil_div<int64_t>(shape.C, depth)) * depth + in_depth, tap = digit(taps);
  const int64_t k = digit(ceil_div<int64_t>(K, panel)) * panel + in_panel, group = rest;
  const bool there = k < K && c < shape.C;
  packed[index] =
      there ? load_nc<int8_t>(weight, ((group * K + k) * shape.C + c) * taps + tap) : int8_t{0};
}

// An output pixel: its image, and where its outputs lie.
struct Int8Conv2dPixel {
  int64_t image, first, stride;
  bool valid;
};

template <class T>
__device__ __forceinline__ Int8Conv2dPixel output_pixel(const Int8Conv2dArgs<T>& args, int64_t m) {
  const int64_t area = args.shape.out_pixels(), channels = args.shape.groups * args.shape.K;
  const bool valid = m < args.shape.N * area;
  const int64_t image = valid ? m / area : 0, pixel = m - image * area;
  if (args.y_last) return {image, m * channels, 1, valid};
  return {image, image * channels * area + pixel, area, valid};
}

// Separate roundings of product and sum, so that every backend gives the same bits.
template <class T>
__device__ __forceinline__ void int8_conv2d_store(const Int8Conv2dArgs<T>& args,
                                                  const Int8Conv2dPixel& to, int64_t k, int sum) {
  const float scale = __fmul_rn(args.input.x_scales[to.image], args.weight_scales[k]);
  const float bias = args.bias == nullptr ? 0.0f : args.bias[k];
  if (args.input.x_zeros.zeros != nullptr) {
    sum -= args.input.x_zeros.zeros[to.image] * args.weight_sums[k];
  }
  const float value = __fadd_rn(__fmul_rn(__int2float_rn(sum), scale), bias);
  args.y[to.first + k * to.stride] = from_float<T>(activate(value, args.activation));
}

// The window of an output pixel: where it begins in its image, which may be outside.
struct Int8Conv2dWindow {
  int64_t image;  // the byte of q where the image's codes begin
  int row, column;
};

template <class T>
__device__ __forceinline__ Int8Conv2dWindow window_of(const Int8Conv2dArgs<T>& args, int64_t m) {
  const Int8Conv2dShape& shape = args.shape;
  const int64_t area = shape.out_pixels();
  const int64_t image = m / area, pixel = m - image * area;
  const int oh = static_cast<int>(pixel / shape.OW);
  const int ow = static_cast<int>(pixel - int64_t{oh} * shape.OW);
  return {image * args.input.codes.image_bytes(), oh * shape.stride_h - shape.padding_h,
          ow * shape.stride_w - shape.padding_w};
}

// The byte of q where the codes of a window's tap begin.
template <class T>
__device__ __forceinline__ int64_t tap_of(const Int8Conv2dArgs<T>& args,
                                          const Int8Conv2dWindow& window, int r, int s) {
  const Int8Conv2dShape& shape = args.shape;
  const int row = window.row + r * shape.dilation_h, column = window.column + s * shape.dilation_w;
  const bool inside = row >= 0 && row < shape.H && column >= 0 && column < shape.W;
  const int64_t pixel = inside ? int64_t{row} * shape.W + column : shape.in_pixels();
  return window.image + pixel * args.input.codes.pixel_bytes();
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) int8_conv2d_tile(Int8Conv2dArgs<T> args) {
  COMPRESSOPS_DYNAMIC_SHARED(int4, shared, Tile::kSharedBytes);
  const Int8Conv2dShape& shape = args.shape;
  const int64_t M = shape.N * shape.out_pixels();
  const int64_t tiles_m = ceil_div<int64_t>(M, Tile::kBlockM);
  const int64_t tiles_k = ceil_div<int64_t>(shape.K, Tile::kBlockN);
  const int64_t group = blockIdx.x / (tiles_m * tiles_k);
  int64_t tile_m, tile_k;
  tile_of_block(blockIdx.x - group * tiles_m * tiles_k, tiles_m, tiles_k, &tile_m, &tile_k);
  const int64_t first_m = tile_m * Tile::kBlockM, first_k = tile_k * Tile::kBlockN;

  const int chunks = static_cast<int>(args.input.codes.chunks());
  const int filter_chunks = shape.R * shape.S * chunks;
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % Tile::kChunks, row = thread / Tile::kChunks;
  const int64_t group_bytes = group * chunks * 16;
  Int8Conv2dWindow windows[Tile::kCopiesLeft];
#pragma unroll
  for (int i = 0; i < Tile::kCopiesLeft; ++i) {
    const int64_t m = first_m + row + i * Tile::kCopyRows;
    windows[i] = window_of(args, m < M ? m : 0);  // of no pixel: any, nobody stores its sums
  }
  // This thread's chunk of the step to load next: 16 channels of a tap.
  int r = 0, s = 0, c = chunk;

  Tile tile;
  multiply_tile(tile, shared, ceil_div(filter_chunks, Tile::kChunks),
                [&](int step, Shared<int4> stage_q, Shared<int4> stage_weight) {
                  for (; c >= chunks; c -= chunks) {
                    if (++s == shape.S) s = 0, ++r;
                  }
                  const bool within = r < shape.R;
                  const int64_t depth = int64_t{step} * Tile::kChunks + chunk;
#pragma unroll
                  for (int i = 0; i < Tile::kCopiesLeft; ++i) {
                    const int64_t source =
                        within ? tap_of(args, windows[i], r, s) + group_bytes + int64_t{c} * 16 : 0;
                    cp_async_16(stage_q + swizzled(row + i * Tile::kCopyRows, chunk),
                                view_as<const int4>(Global<const int8_t>(args.input.q) + source),
                                within);
                  }
#pragma unroll
                  for (int i = 0; i < Tile::kCopiesRight; ++i) {
                    const int64_t k = first_k + row + i * Tile::kCopyRows;
                    const bool valid = within && k < shape.K;
                    const int64_t source = ((group * shape.K + k) * filter_chunks + depth) * 16;
                    cp_async_16(stage_weight + swizzled(row + i * Tile::kCopyRows, chunk),
                                view_as<const int4>(args.weight + (valid ? source : 0)), valid);
                  }
                  c += Tile::kChunks;
                });
  store_tile(
      tile, [&](int m) { return output_pixel(args, first_m + m); },
      [&](const Int8Conv2dPixel& pixel, int column, int sum) {
        const int64_t k = first_k + column;
        if (k < shape.K) int8_conv2d_store(args, pixel, group * shape.K + k, sum);
      });
}

// Threads of a block: so many pixels, and so many fours of output channels.
constexpr int kFewPixels = 32, kFewFours = 8;
constexpr int kFewThreads = kFewPixels * kFewFours;

// Byte i of a word, as a number.
__device__ __forceinline__ int byte_of(unsigned word, int i) {
  return static_cast<int8_t>(word >> (8 * i) & 0xffu);
}

template <class T, bool kChannels>
__global__ void __launch_bounds__(kFewThreads) int8_conv2d_few(Int8Conv2dArgs<T> args) {
  const Int8Conv2dShape& shape = args.shape;
  const int64_t groups = kChannels ? 1 : shape.groups, K = kChannels ? shape.groups : shape.K;
  const int64_t fours = ceil_div<int64_t>(K, 4), chunks = kChannels ? 1 : args.input.codes.chunks();
  const int64_t pixel_blocks = ceil_div<int64_t>(shape.N * shape.out_pixels(), kFewPixels);
  const int thread = static_cast<int>(threadIdx.x);
  // Neighbouring threads store neighbouring outputs.
  const int in_pixels = args.y_last ? thread / kFewFours : thread % kFewPixels;
  const int in_fours = args.y_last ? thread % kFewFours : thread / kFewPixels;
  const int64_t m = int64_t{blockIdx.x} % pixel_blocks * kFewPixels + in_pixels;
  const int64_t four = int64_t{blockIdx.x} / pixel_blocks * kFewFours + in_fours;
  const Int8Conv2dPixel pixel = output_pixel(args, m);
  if (!pixel.valid || four >= groups * fours) return;

  const int64_t group = four / fours, k = four % fours * 4;
  const Int8Conv2dWindow window = window_of(args, m);
  // Panels of 16 outputs, of which this thread has 4.
  constexpr int kOutputBytes = kChannels ? 1 : 4;
  const int64_t panel = group * ceil_div<int64_t>(K, 16) + k / 16;
  int64_t at = panel * shape.R * shape.S * chunks * 16 * kOutputBytes + k % 16 * kOutputBytes;
  int sums[4] = {};
  for (int r = 0; r < shape.R; ++r) {
    for (int s = 0; s < shape.S; ++s) {
      const Global<const unsigned> q = view_as<const unsigned>(
          Global<const int8_t>(args.input.q) +
          (tap_of(args, window, r, s) + (kChannels ? k : group * chunks * 4)));
      if constexpr (kChannels) {
        const unsigned codes = load_nc<unsigned>(q, 0);
        const unsigned weights = load_nc<unsigned>(view_as<const unsigned>(args.weight + at), 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += byte_of(codes, i) * byte_of(weights, i);
        at += 16;
      } else {
        for (int64_t c = 0; c < chunks; ++c, at += 64) {
          const int codes = static_cast<int>(load_nc<unsigned>(q, c));
          const int4 weights = load_nc<int4>(view_as<const int4>(args.weight + at), 0);
          sums[0] = __dp4a(codes, weights.x, sums[0]);
          sums[1] = __dp4a(codes, weights.y, sums[1]);
          sums[2] = __dp4a(codes, weights.z, sums[2]);
          sums[3] = __dp4a(codes, weights.w, sums[3]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (k + i < K) int8_conv2d_store(args, pixel, group * K + k + i, sums[i]);
  }
}

// The largest tile that still gives every multiprocessor a block: it reads each byte for the most
// operations. Groups of few output channels would leave half of it empty.
inline Int8Conv2dKernel choose_int8_conv2d(const Int8Conv2dShape& shape, int64_t multiprocessors) {
  constexpr int64_t kLarge = Int8Tile128::kBlockM;
  const int64_t tiles =
      ceil_div(shape.N * shape.out_pixels(), kLarge) * ceil_div(shape.K, kLarge) * shape.groups;
  return shape.K > Int8Tile64::kBlockN && tiles >= multiprocessors ? Int8Conv2dKernel::kTile128
                                                                   : Int8Conv2dKernel::kTile64;
}

template <class Tile, class T>
cudaError_t launch_int8_conv2d_tile(const Int8Conv2dArgs<T>& args, cudaStream_t stream) {
  const Int8Conv2dShape& shape = args.shape;
  const int64_t blocks = ceil_div<int64_t>(shape.N * shape.out_pixels(), Tile::kBlockM) *
                         ceil_div<int64_t>(shape.K, Tile::kBlockN) * shape.groups;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(int8_conv2d_tile<T, Tile>, dim3(static_cast<unsigned>(blocks)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, args);
}

template <bool kChannels, class T>
cudaError_t launch_int8_conv2d_few(const Int8Conv2dArgs<T>& args, cudaStream_t stream) {
  const Int8Conv2dShape& shape = args.shape;
  const int64_t fours =
      kChannels ? ceil_div<int64_t>(shape.groups, 4) : shape.groups * ceil_div<int64_t>(shape.K, 4);
  const int64_t blocks = ceil_div<int64_t>(shape.N * shape.out_pixels(), kFewPixels) *
                         ceil_div<int64_t>(fours, kFewFours);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(int8_conv2d_few<T, kChannels>, dim3(static_cast<unsigned>(blocks)),
                dim3(kFewThreads), 0, stream, args);
}

inline cudaError_t launch_int8_conv2d_pack(const Int8Conv2dShape& shape,
                                           Global<const int8_t> weight, Global<int8_t> packed,
                                           cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t bytes = shape.weight_bytes(), blocks = ceil_div<int64_t>(bytes, kThreads);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(int8_conv2d_pack, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                shape, weight, packed, bytes);
}

// Quantizes and convolves. `kernel` other than kAuto forces a tile; `max_blocks` bounds the grids
// of the quantization.
template <class T>
cudaError_t launch_int8_conv2d(const Int8Conv2dArgs<T>& args, int64_t multiprocessors,
                               cudaStream_t stream,
                               Int8Conv2dKernel kernel = Int8Conv2dKernel::kAuto,
                               int64_t max_blocks = 0x7fffffff) {
  if (args.shape.N == 0) return cudaSuccess;
  const auto quantize =
      args.scaling == RowScaling::kSymmetric    ? launch_quantize_images<T, RowScaling::kSymmetric>
      : args.scaling == RowScaling::kAsymmetric ? launch_quantize_images<T, RowScaling::kAsymmetric>
                                                : launch_quantize_images<T, RowScaling::kStatic>;
  const cudaError_t error = quantize(args.input, stream, max_blocks);
  if (error != cudaSuccess) return error;
  if (args.shape.form == Int8Conv2dForm::kChannels) {
    return launch_int8_conv2d_few<true>(args, stream);
  }
  if (args.shape.form == Int8Conv2dForm::kPanels) {
    return launch_int8_conv2d_few<false>(args, stream);
  }
  if (kernel == Int8Conv2dKernel::kAuto) kernel = choose_int8_conv2d(args.shape, multiprocessors);
  return kernel == Int8Conv2dKernel::kTile128 ? launch_int8_conv2d_tile<Int8Tile128>(args, stream)
                                              : launch_int8_conv2d_tile<Int8Tile64>(args, stream);
}

}  // namespace compressops
