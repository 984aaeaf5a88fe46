// winograd_conv2d: y = activation(Aᵀ[U ⊙ V]A + bias), V = Bᵀ d B of every tile d of x, where the
// products of all channels make one matrix product a position: M[p] = V[p] @ U[p].T.
//
// P = alpha² positions (alpha in one dimension), T tiles of m² outputs, C to K channels. A direct
// convolution does 2 m² r² C K FLOP a tile, this 2 P C K: 2.25, 4 and 5.06 times fewer for r = 3
// and m = 2, 4, 6. What decides on a GPU is where V and M live.
//
// Fused (16 bits, P ≤ 16; winograd_conv2d_fused.cuh). Accumulators of P × tiles × channels must fit
// the registers of a multiprocessor, so a block has 64 tiles of 32 channels for P = 16: 32768 sums,
// 128 for each of 256 threads. A channel of it takes 2 · 16 · 64 · 32 = 65536 FLOP, 1.0 KB of U and
// some 0.7 KB of x from L2 (38 FLOP a byte, 87 of the direct convolution's), and 8 KB through
// shared memory and L1: x 2, V 2 + 2, U 1 + 1. At 128 bytes a clock these, 64 clocks, come before
// the tensor cores' 25 (mma.sync, 2600 FLOP a clock on Hopper): 520 TFLOP/s of direct convolution
// on an H200 are the ceiling, whatever C and K, and V and M cost no traffic, which serves small C
// and K. One-dimensional tiles (P = 4, 6, 8) have 64 or 128 channels a block and come to 16 FLOP a
// byte.
//
// Chunked (winograd_conv2d_chunk.cuh, ..._gemm.cuh). With P = 36 or 64 such a block would have 32 ×
// 32 or 16 × 32 outputs and read U at 32 or 16 FLOP a byte. So x is transformed to V, multiplied in
// large tiles, and M transformed to y, in chunks of tiles whose V and M together are about an L2:
// a product of 128 × 256 does 85 FLOP a byte, and of F(4, 3) a tile takes, in bytes,
//     x 32 C (read 1.6 times)   V 72 C written, 72 C ⌈K/256⌉ read   M 72 K written and read   y 32
//     K
// beside U, 72 C K a product of 128 tiles. For C = K = 256 that is 120 KB a tile for 18.9 MFLOP of
// the direct convolution: at 6 TB/s of L2 20 ns or 940 TFLOP/s; for 512, 1350; for 64, 270. M in
// float32 would take 144 K: 740 for 256. Products in float32 (FFMA) are bound by arithmetic from
// C = 128 on: 4 · 0.8 · 67 TFLOP/s for F(4, 3). The figures are ceilings; none is measured yet.
//
// Sources: Lavin & Gray 2015, arXiv 1509.09308; the chunks are the idea of oneDNN 3.1's
// jit_avx512_core_f32_wino_conv_4x3.
#pragma once

#include "winograd_conv2d_fused.cuh"

namespace compressops {

// Which kernels serve a shape. The tests force each. kFusedShallow is kFused in the shared memory
// that every GPU has.
enum class WinogradKernel : int { kAuto = -1, kFused, kChunkedSmall, kChunkedLarge, kFusedShallow };

// Tiles of the products: small where there would be too few large ones, or these too empty.
template <class T>
struct WinogradTilings {
  using Small = WinogradTiling<64, 64, 32, 32, 4>;
  using Large = WinogradTiling<128, 256, 64, 64, 4>;
};
template <>
struct WinogradTilings<float> {
  using Small = WinogradTiling<64, 64, 32, 32, 4>;
  using Large = WinogradTiling<128, 128, 32, 64, 4>;
};

// How a convolution is divided, and the scratch memory that it takes.
struct WinogradPlan {
  WinogradKernel kernel;
  int64_t tiles, groups;  // in a chunk, at most
  int64_t u_bytes, v_bytes, m_bytes, scale_bytes;

  bool fused() const {
    return kernel == WinogradKernel::kFused || kernel == WinogradKernel::kFusedShallow;
  }
  int64_t scratch_bytes() const { return u_bytes + v_bytes + m_bytes + scale_bytes; }
};

// Words of a row of `count` elements that is filled up to whole 16 bytes.
template <class T>
int64_t winograd_words(int64_t count) {
  return ceil_div<int64_t>(count, 16 / sizeof(T)) * 4;
}

// The chunk of `tiles` tiles and `groups` groups from those on.
template <class T>
WinogradChunk winograd_chunk(const WinogradShape& shape, bool channels_last, WinogradKernel kernel,
                             int64_t first_group, int64_t groups, int64_t first_tile,
                             int64_t tiles) {
  WinogradChunk chunk;
  chunk.first_group = first_group;
  chunk.groups = groups;
  chunk.first_tile = first_tile;
  chunk.tiles = tiles;
  chunk.v_words = winograd_words<T>(shape.C);
  chunk.rows = channels_last ? tiles : shape.K;
  chunk.columns = channels_last ? shape.K : tiles;
  chunk.m_words = winograd_words<T>(chunk.columns);
  const bool large = kernel == WinogradKernel::kChunkedLarge;
  chunk.row_log2 = chunk.column_log2 = large ? 6 : 5;
  chunk.scale_rows = ceil_div(chunk.rows, int64_t{1} << chunk.row_log2);
  chunk.scale_columns = ceil_div(chunk.columns, int64_t{1} << chunk.column_log2);
  return chunk;
}

template <class Tiling>
int64_t winograd_product_blocks(int64_t rows, int64_t columns, int64_t matrices) {
  return ceil_div<int64_t>(rows, Tiling::kBlockM) * ceil_div<int64_t>(columns, Tiling::kBlockN) *
         matrices;
}

template <class T>
constexpr bool winograd_fusible(const WinogradShape& shape) {
  return kPerWord<T> == 2 && shape.positions() <= 16;
}

// `shared_bytes` is what a block may take of shared memory; `scratch_bytes` what V and M of a chunk
// may take, more only where 128 tiles need it.
template <class T>
WinogradPlan plan_winograd_conv2d(const WinogradArgs<T>& args, int64_t multiprocessors,
                                  int64_t shared_bytes, int64_t scratch_bytes,
                                  WinogradKernel kernel = WinogradKernel::kAuto) {
  const WinogradShape& shape = args.shape;
  const bool channels_last = args.y_strides.c == 1;
  WinogradPlan plan = {kernel, 0, 0, 0, 0, 0, 0};
  if (shape.C % (16 / sizeof(T)) != 0 || misalignment(args.u, 16) != 0) {
    plan.u_bytes = shape.positions() * shape.groups * shape.K * 4 * winograd_words<T>(shape.C);
  }
  if (kernel == WinogradKernel::kAuto && winograd_fusible<T>(shape)) {
    const bool deep = shape.positions() < 16 || shared_bytes >= WinogradFusion<4, 4>::kSharedBytes;
    plan.kernel = deep ? WinogradKernel::kFused : WinogradKernel::kFusedShallow;
  }
  if (plan.fused()) return plan;

  constexpr int64_t kTiles = 128;  // a multiple of which fills the products' tiles
  const int64_t all = max(shape.tiles(), int64_t{1}), P = shape.positions();
  const WinogradChunk one = winograd_chunk<T>(shape, true, kernel, 0, 1, 0, 1);
  const int64_t bytes_a_tile = 4 * P * (one.v_words + one.m_words);
  const int64_t fit = max(scratch_bytes / max(bytes_a_tile, int64_t{1}), kTiles);
  const int64_t chunks = ceil_div(all, min(all, fit / kTiles * kTiles));
  plan.tiles = min(all, ceil_div(ceil_div(all, chunks), kTiles) * kTiles);
  plan.groups = chunks > 1 ? 1 : min(shape.groups, max(fit / plan.tiles, int64_t{1}));

  if (kernel == WinogradKernel::kAuto) {
    using Large = typename WinogradTilings<T>::Large;
    const int64_t rows = channels_last ? plan.tiles : shape.K;
    const int64_t columns = channels_last ? shape.K : plan.tiles;
    const int64_t blocks = winograd_product_blocks<Large>(rows, columns, P * plan.groups);
    const int64_t area = blocks * Large::kBlockM * Large::kBlockN;
    const bool full = 2 * rows * columns * P * plan.groups >= area;
    plan.kernel = full && 2 * blocks >= multiprocessors ? WinogradKernel::kChunkedLarge
                                                        : WinogradKernel::kChunkedSmall;
  }
  const WinogradChunk chunk =
      winograd_chunk<T>(shape, channels_last, plan.kernel, 0, plan.groups, 0, plan.tiles);
  plan.v_bytes = 4 * plan.groups * P * plan.tiles * chunk.v_words;
  plan.m_bytes = 4 * plan.groups * P * chunk.rows * chunk.m_words;
  if (kPerWord<T> == 2) {
    plan.scale_bytes = 4 * plan.groups * P * chunk.scale_rows * chunk.scale_columns;
  }
  return plan;
}

inline bool winograd_grid(int64_t blocks, dim3* grid) {
  *grid = dim3(static_cast<unsigned>(blocks));
  return blocks <= 0x7fffffff;
}

template <class Tiling, class T>
cudaError_t launch_winograd_multiply(const WinogradArgs<T>& args, const WinogradChunk& chunk,
                                     Global<const T> v, Global<WinogradProduct<T>> m,
                                     Global<float> scales, cudaStream_t stream) {
  dim3 grid;
  if (!winograd_grid(winograd_product_blocks<Tiling>(chunk.rows, chunk.columns,
                                                     args.shape.positions() * chunk.groups),
                     &grid)) {
    return cudaErrorInvalidValue;
  }
  return launch(winograd_multiply<T, Tiling>, grid, dim3(Tiling::kThreads), Tiling::kSharedBytes,
                stream, args, chunk, v, m, scales);
}

template <int kAlphaH, int kAlphaW, class T>
cudaError_t launch_winograd_chunk(const WinogradArgs<T>& args, const WinogradPlan& plan,
                                  const WinogradChunk& chunk, Global<int4> scratch,
                                  cudaStream_t stream) {
  const auto part = [&](int64_t first, int64_t bytes) {
    return slice(view_as<uint32_t>(scratch), first / 4, bytes / 4);
  };
  const Global<uint32_t> v = part(plan.u_bytes, plan.v_bytes);
  const Global<uint32_t> m = part(plan.u_bytes + plan.v_bytes, plan.m_bytes);
  const Global<float> scales =
      view_as<float>(part(plan.u_bytes + plan.v_bytes + plan.m_bytes, plan.scale_bytes));

  dim3 grid;
  if (args.shape.C > 0) {
    const int64_t blocks = args.x_channels_last
                               ? winograd_blocks(chunk.tiles, chunk.v_words)
                               : ceil_div<int64_t>(chunk.tiles, kWarpSize) *
                                     ceil_div<int64_t>(chunk.v_words, kWinogradRun);
    if (!winograd_grid(chunk.groups * blocks, &grid)) return cudaErrorInvalidValue;
    const cudaError_t error =
        launch(args.x_channels_last ? winograd_input_channels<T, kAlphaH, kAlphaW>
                                    : winograd_input_tiles<T, kAlphaH, kAlphaW>,
               grid, dim3(kWinogradThreads), 0, stream, args, chunk, v);
    if (error != cudaSuccess) return error;
  }

  using Tilings = WinogradTilings<T>;
  const Global<const T> operand = view_as<const T>(v);
  const Global<WinogradProduct<T>> products = view_as<WinogradProduct<T>>(m);
  const cudaError_t error = plan.kernel == WinogradKernel::kChunkedLarge
                                ? launch_winograd_multiply<typename Tilings::Large>(
                                      args, chunk, operand, products, scales, stream)
                                : launch_winograd_multiply<typename Tilings::Small>(
                                      args, chunk, operand, products, scales, stream);
  if (error != cudaSuccess) return error;

  const int64_t words = ceil_div<int64_t>(chunk.columns, kPerWord<T>);
  if (!winograd_grid(chunk.groups * winograd_blocks(chunk.rows, words), &grid)) {
    return cudaErrorInvalidValue;
  }
  return launch(args.y_channels_last ? winograd_output<T, kAlphaH, kAlphaW, true>
                                     : winograd_output<T, kAlphaH, kAlphaW, false>,
                grid, dim3(kWinogradThreads), 0, stream, args, chunk, Global<const uint32_t>(m),
                Global<const float>(scales));
}

template <int kAlphaH, int kAlphaW, class T>
cudaError_t launch_winograd_chunked(const WinogradArgs<T>& args, const WinogradPlan& plan,
                                    Global<int4> scratch, cudaStream_t stream) {
  const WinogradShape& shape = args.shape;
  for (int64_t group = 0; group < shape.groups; group += plan.groups) {
    for (int64_t tile = 0; tile < shape.tiles(); tile += plan.tiles) {
      const WinogradChunk chunk = winograd_chunk<T>(shape, args.y_channels_last, plan.kernel, group,
                                                    min(plan.groups, shape.groups - group), tile,
                                                    min(plan.tiles, shape.tiles() - tile));
      const cudaError_t error =
          launch_winograd_chunk<kAlphaH, kAlphaW>(args, plan, chunk, scratch, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

template <class Fusion, class T>
cudaError_t launch_winograd_fusion(const WinogradArgs<T>& args, cudaStream_t stream) {
  const WinogradShape& shape = args.shape;
  dim3 grid;
  if (!winograd_grid(shape.groups * ceil_div<int64_t>(shape.tiles(), Fusion::kTiles) *
                         ceil_div<int64_t>(shape.K, Fusion::kBlockK),
                     &grid)) {
    return cudaErrorInvalidValue;
  }
  return launch(winograd_fused<T, Fusion>, grid, dim3(Fusion::kThreads), Fusion::kSharedBytes,
                stream, args);
}

template <int kAlphaH, int kAlphaW, class T>
cudaError_t launch_winograd_fused(const WinogradArgs<T>& args, const WinogradPlan& plan,
                                  cudaStream_t stream) {
  using Deep = WinogradFusion<kAlphaH, kAlphaW>;
  if constexpr (Deep::kSharedBytes > kLeastSharedBytes) {
    using Shallow = WinogradFusion<kAlphaH, kAlphaW, 2>;
    static_assert(Shallow::kSharedBytes <= kLeastSharedBytes);
    if (plan.kernel == WinogradKernel::kFusedShallow) {
      return launch_winograd_fusion<Shallow>(args, stream);
    }
  }
  return launch_winograd_fusion<Deep>(args, stream);
}

template <int kAlphaH, int kAlphaW, class T>
cudaError_t launch_winograd(const WinogradArgs<T>& args, const WinogradPlan& plan,
                            Global<int4> scratch, cudaStream_t stream) {
  // Each size has one way, but for the tiles of the products: the other would lose everywhere.
  constexpr bool kFused = kPerWord<T> == 2 && kAlphaH * kAlphaW <= 16;
  if (kFused != plan.fused()) return cudaErrorInvalidValue;
  if constexpr (kFused) {
    return launch_winograd_fused<kAlphaH, kAlphaW>(args, plan, stream);
  } else {
    return launch_winograd_chunked<kAlphaH, kAlphaW>(args, plan, scratch, stream);
  }
}

// `scratch` holds plan.scratch_bytes().
template <class T>
cudaError_t launch_winograd_conv2d(WinogradArgs<T> args, const WinogradPlan& plan,
                                   Global<int4> scratch, cudaStream_t stream) {
  const WinogradShape& shape = args.shape;
  if (shape.tiles() == 0 || shape.K == 0 || shape.groups == 0) return cudaSuccess;
  describe_layout(args);
  if (plan.u_bytes > 0) {
    const int64_t rows = shape.positions() * shape.groups * shape.K;
    const int64_t words = winograd_words<T>(shape.C);
    const Global<uint32_t> padded = slice(view_as<uint32_t>(scratch), 0, plan.u_bytes / 4);
    dim3 grid;
    if (!winograd_grid(winograd_blocks(rows, words), &grid)) return cudaErrorInvalidValue;
    const cudaError_t error = launch(winograd_pad_u<T>, grid, dim3(kWinogradThreads), 0, stream,
                                     args.u, rows, shape.C, words, padded);
    if (error != cudaSuccess) return error;
    args.u = view_as<const T>(padded);
  }
  const bool flat = shape.alpha_h == 1;
  switch (shape.alpha_w) {
    case 4:
      return flat ? launch_winograd<1, 4>(args, plan, scratch, stream)
                  : launch_winograd<4, 4>(args, plan, scratch, stream);
    case 6:
      return flat ? launch_winograd<1, 6>(args, plan, scratch, stream)
                  : launch_winograd<6, 6>(args, plan, scratch, stream);
    case 8:
      return flat ? launch_winograd<1, 8>(args, plan, scratch, stream)
                  : launch_winograd<8, 8>(args, plan, scratch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace compressops
