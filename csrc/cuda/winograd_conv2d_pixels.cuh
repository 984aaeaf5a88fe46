// What the kernels of winograd_conv2d are given; how they number tiles, read x and write y.
#pragma once

#include <initializer_list>

#include "activation.cuh"
#include "device.cuh"
#include "ptx.cuh"
#include "winograd_conv2d_transforms.cuh"

namespace compressops {

struct WinogradShape {
  int64_t N, groups, C, K;  // C and K of one group
  int64_t H, W, OH, OW, padding_h, padding_w;
  int alpha_h, alpha_w, tile_h, tile_w;  // alpha_h = tile_h = 1: one dimension
  int64_t tile_rows, tile_columns;       // of one image

  __host__ __device__ int64_t tiles() const { return N * tile_rows * tile_columns; }
  __host__ __device__ int positions() const { return alpha_h * alpha_w; }
};

// Kernels of r × r taps, or 1 × r if `flat`; tiles of `tile` outputs in each dimension.
inline WinogradShape make_winograd_shape(int64_t N, int64_t groups, int64_t C, int64_t K, int64_t H,
                                         int64_t W, int64_t padding_h, int64_t padding_w, int64_t r,
                                         int64_t tile, bool flat) {
  WinogradShape shape = {};
  shape.N = N, shape.groups = groups, shape.C = C, shape.K = K;
  shape.H = H, shape.W = W, shape.padding_h = padding_h, shape.padding_w = padding_w;
  shape.OH = H + 2 * padding_h - (flat ? 1 : r) + 1;
  shape.OW = W + 2 * padding_w - r + 1;
  shape.tile_w = static_cast<int>(tile), shape.alpha_w = static_cast<int>(tile + r - 1);
  shape.tile_h = flat ? 1 : shape.tile_w, shape.alpha_h = flat ? 1 : shape.alpha_w;
  shape.tile_rows = ceil_div<int64_t>(shape.OH, shape.tile_h);
  shape.tile_columns = ceil_div<int64_t>(shape.OW, shape.tile_w);
  return shape;
}

struct WinogradStrides {
  int64_t n, c, h, w;
};

template <class T>
struct WinogradArgs {
  WinogradShape shape;
  Global<const T> x;
  WinogradStrides x_strides;
  Global<const T> u;         // [P, groups · K, C]
  Global<const float> bias;  // [groups · K] or null
  Activation activation;
  Global<T> y;
  WinogradStrides y_strides;  // those of NCHW or of NHWC
  // Lanes take channels where these lie side by side, else tiles.
  bool x_channels_last, y_channels_last;
  bool x_words;  // of 16 bits: channels lie in aligned pairs
  // Elements that a store takes: channels where they are last, else columns of a tile.
  int y_vector;
};

// Whether rows of a multiple of `vector` elements, `strides` apart, are made of aligned vectors.
template <class T>
bool in_vectors(Global<T> data, int vector, int64_t count, std::initializer_list<int64_t> strides) {
  bool whole = count % vector == 0 && misalignment(data, vector * static_cast<int>(sizeof(T))) == 0;
  for (int64_t stride : strides) whole = whole && stride % vector == 0;
  return whole;
}

// Fills in what follows from the rest.
template <class T>
void describe_layout(WinogradArgs<T>& args) {
  const WinogradShape& s = args.shape;
  const WinogradStrides &x = args.x_strides, &y = args.y_strides;
  args.x_channels_last = x.c == 1;
  args.x_words =
      kPerWord<T> == 1 || (args.x_channels_last && in_vectors(args.x, 2, s.C, {x.n, x.h, x.w}));
  args.y_channels_last = y.c == 1;
  args.y_vector = 1;
  if (args.y_channels_last) {
    if (kPerWord<T> == 2 && in_vectors(args.y, 2, s.K, {y.n, y.h, y.w})) args.y_vector = 2;
  } else {
    for (int vector : {2, 4}) {
      const bool whole = s.tile_w % vector == 0 && (vector == 2 || s.tile_w == 4);
      if (whole && in_vectors(args.y, vector, s.OW, {y.n, y.c, y.h})) args.y_vector = vector;
    }
  }
}

// The tile `index` of all images, and the output at which it begins.
struct WinogradTile {
  int64_t n, row, column;

  __device__ __forceinline__ WinogradTile(const WinogradShape& shape, int64_t index) {
    const int64_t line = index / shape.tile_columns;
    column = (index - line * shape.tile_columns) * shape.tile_w;
    n = line / shape.tile_rows;
    row = (line - n * shape.tile_rows) * shape.tile_h;
  }
};

// The window of x that a tile reads: where it begins and which of its rows and columns lie in the
// image. None do past the last tile.
struct WinogradWindow {
  int64_t corner;
  unsigned inside;  // rows from bit 0 on, columns from bit 8 on

  WinogradWindow() = default;
  __device__ __forceinline__ WinogradWindow(const WinogradShape& shape,
                                            const WinogradStrides& strides, int64_t index) {
    const WinogradTile tile(shape, index);
    const int64_t h0 = tile.row - shape.padding_h, w0 = tile.column - shape.padding_w;
    corner = tile.n * strides.n + h0 * strides.h + w0 * strides.w;
    inside = 0;
    if (tile.n >= shape.N) return;
    for (int i = 0; i < shape.alpha_h; ++i) {
      inside |= static_cast<unsigned>(h0 + i >= 0 && h0 + i < shape.H) << i;
    }
    for (int j = 0; j < shape.alpha_w; ++j) {
      inside |= static_cast<unsigned>(w0 + j >= 0 && w0 + j < shape.W) << (8 + j);
    }
  }
};

// The pixels of a window, of the word of channels that begins `offset` elements from its corner and
// of which there are `channels`. Those outside the image and channels past the last are zeros.
template <class T, int kAlphaH, int kAlphaW>
__device__ __forceinline__ void winograd_load(const WinogradArgs<T>& args,
                                              const WinogradWindow& window, int64_t offset,
                                              int64_t channels,
                                              uint32_t (&words)[kAlphaH][kAlphaW]) {
  const WinogradStrides& strides = args.x_strides;
  const unsigned mask = channels > 0 ? window.inside : 0;
  const auto load_all = [&](auto&& load) {
    Global<const T> row = args.x + (window.corner + offset);
#pragma unroll
    for (int i = 0; i < kAlphaH; ++i) {
      Global<const T> at = row;
#pragma unroll
      for (int j = 0; j < kAlphaW; ++j) {
        load(words[i][j], at, (mask >> i & mask >> (8 + j) & 1) != 0);
        at = at + strides.w;
      }
      row = row + strides.h;
    }
  };
  if constexpr (kPerWord<T> == 2) {
    if (!args.x_words) {
      // One channel after the other, to hold fewer of the halves at a time.
      const bool both = channels > 1;
      load_all([&](uint32_t& word, Global<const T> at, bool inside) {
        word = inside ? load_nc<uint16_t>(view_as<const uint16_t>(at), 0) : uint16_t{0};
      });
      load_all([&](uint32_t& word, Global<const T> at, bool inside) {
        const Global<const uint16_t> next = view_as<const uint16_t>(at + strides.c);
        word |= static_cast<uint32_t>(inside && both ? load_nc<uint16_t>(next, 0) : uint16_t{0})
                << 16;
      });
      return;
    }
  }
  load_all([&](uint32_t& word, Global<const T> at, bool inside) {
    word = inside ? load_nc<uint32_t>(view_as<const uint32_t>(at), 0) : 0u;
  });
}

template <class T>
__device__ __forceinline__ void store_word(Global<T> y, int64_t at,
                                           const float (&values)[kPerWord<T>]) {
  view_as<uint32_t>(y + at)[0] = pack_word<T>(values);
}

// Four elements side by side.
template <class T>
__device__ __forceinline__ void store_four(Global<T> y, int64_t at, const float* values) {
  if constexpr (kPerWord<T> == 1) {
    int4 words;
    words.x = static_cast<int>(__float_as_uint(values[0]));
    words.y = static_cast<int>(__float_as_uint(values[1]));
    words.z = static_cast<int>(__float_as_uint(values[2]));
    words.w = static_cast<int>(__float_as_uint(values[3]));
    view_as<int4>(y + at)[0] = words;
  } else {
    int2 words;
    words.x = static_cast<int>(pack_word<T>({values[0], values[1]}));
    words.y = static_cast<int>(pack_word<T>({values[2], values[3]}));
    view_as<int2>(y + at)[0] = words;
  }
}

// A row of outputs that begins at y[n, k + s, row, column], for the s-th of kCount channels of a
// group: bias, activation, and what of it lies in the image.
template <class T, int kCount, int kWidth>
__device__ __forceinline__ void winograd_store(const WinogradArgs<T>& args, int64_t n,
                                               int64_t group, int64_t k, int64_t row,
                                               int64_t column, float (&values)[kCount][kWidth]) {
  const WinogradShape& shape = args.shape;
  const WinogradStrides& strides = args.y_strides;
  if (row >= shape.OH) return;
  const int64_t channel = group * shape.K + k;
  const int64_t corner = n * strides.n + channel * strides.c + row * strides.h + column * strides.w;
  const int width = static_cast<int>(min(int64_t{shape.tile_w}, shape.OW - column));
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const bool has_bias = !(args.bias == nullptr) && k + s < shape.K;
    const float bias = has_bias ? load_nc<float>(args.bias, channel + s) : 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[s][j] += bias;
  }
  // One branch for all of them.
  const auto apply = [&](Activation activation) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[s][j] = activate(values[s][j], activation);
    }
  };
  if (args.activation == Activation::kRelu) apply(Activation::kRelu);
  if (args.activation == Activation::kGelu) apply(Activation::kGelu);
  if (args.y_channels_last) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (j >= width) break;
      const int64_t at = corner + j * strides.w;
      if constexpr (kCount == kPerWord<T>) {
        if (args.y_vector > 1) {
          float word[kCount];
#pragma unroll
          for (int s = 0; s < kCount; ++s) word[s] = values[s][j];
          if (k < shape.K) store_word<T>(args.y, at, word);
          continue;
        }
      }
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        if (k + s < shape.K) args.y[at + s] = from_float<T>(values[s][j]);
      }
    }
    return;
  }
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    if (k + s >= shape.K) break;
    const int64_t start = corner + s * strides.c;
    if (kWidth >= 4 && args.y_vector == 4) {  // then the tile is 4 wide, and so are all
      store_four<T>(args.y, start, values[s]);
    } else if (kWidth >= 2 && args.y_vector == 2) {
#pragma unroll
      for (int j = 0; j + 1 < kWidth; j += 2) {
        if (j >= width) break;
        if constexpr (kPerWord<T> == 2) {
          store_word<T>(args.y, start + j, {values[s][j], values[s][j + 1]});
        } else {
          int2 words;
          words.x = static_cast<int>(__float_as_uint(values[s][j]));
          words.y = static_cast<int>(__float_as_uint(values[s][j + 1]));
          view_as<int2>(args.y + (start + j))[0] = words;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (j < width) args.y[start + j] = from_float<T>(values[s][j]);
      }
    }
  }
}

}  // namespace compressops
