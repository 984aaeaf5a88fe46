// Which kernel of int8_linear serves a shape, and the launches.
#pragma once

#include "int8_linear.cuh"
#include "int8_linear_wgmma.cuh"

namespace compressops {

// The tests force each.
enum class Int8LinearKernel : int {
  kAuto = -1,
  kRows1,
  kRows4,
  kRows16,
  kTile64,
  kTile128,
  kWgmma128,
  kWgmma256
};

struct Int8LinearChoice {
  int capability;            // 0: of any GPU; else of this compute capability alone
  int64_t max_m;             // serves M up to this
  int64_t min_tiles;         // and only if it makes so many blocks per multiprocessor
  int64_t block_m, block_n;  // of a block's tile; 0: no tiles
  Int8LinearKernel kernel;
};

// The first row that fits. Small M: the smallest kernel that holds all its rows. Then the largest
// tile that still gives every multiprocessor a block: it reads each byte for the most operations.
// From counting bytes and tiles, not yet from measurements.
constexpr int64_t kAnyM = INT64_MAX;
constexpr Int8LinearChoice kInt8LinearChoices[] = {
    {0, 1, 0, 0, 0, Int8LinearKernel::kRows1},
    {0, 4, 0, 0, 0, Int8LinearKernel::kRows4},
    {0, 16, 0, 0, 0, Int8LinearKernel::kRows16},
    {90, kAnyM, 1, 128, 256, Int8LinearKernel::kWgmma256},
    {90, kAnyM, 1, 128, 128, Int8LinearKernel::kWgmma128},
    {0, kAnyM, 1, 128, 128, Int8LinearKernel::kTile128},
    {0, kAnyM, 0, 64, 64, Int8LinearKernel::kTile64},
};

// `capability`: 10 major + minor, and 0 for one whose own kernels may not be used.
inline Int8LinearKernel choose_int8_linear(int64_t M, int64_t N, int64_t multiprocessors,
                                           int capability) {
  for (const Int8LinearChoice& choice : kInt8LinearChoices) {
    if (M > choice.max_m || (choice.capability != 0 && choice.capability != capability)) continue;
    if (choice.block_m == 0) return choice.kernel;
    const int64_t tiles = ceil_div(M, choice.block_m) * ceil_div(N, choice.block_n);
    if (tiles >= choice.min_tiles * multiprocessors) return choice.kernel;
  }
  return Int8LinearKernel::kTile64;
}

template <int kRows, class T>
cudaError_t launch_int8_linear_rows(const Int8LinearArgs<T>& args, bool aligned,
                                    cudaStream_t stream) {
  if (args.M > kRows) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div<int64_t>(args.N, kRowsWarps * kRowsColumns);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(aligned ? int8_linear_rows<T, kRows, true> : int8_linear_rows<T, kRows, false>,
                dim3(static_cast<unsigned>(blocks)), dim3(kRowsWarps * kWarpSize), 0, stream, args);
}

template <class Tile, bool kAligned, class T>
cudaError_t launch_int8_linear_tile(const Int8LinearArgs<T>& args, cudaStream_t stream) {
  const int64_t blocks =
      ceil_div<int64_t>(args.M, Tile::kBlockM) * ceil_div<int64_t>(args.N, Tile::kBlockN);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(int8_linear_tile<T, Tile, kAligned>, dim3(static_cast<unsigned>(blocks)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, args);
}

// Runs both kernels. `kernel` other than kAuto forces one; `max_blocks` bounds the first grid.
template <class T>
cudaError_t launch_int8_linear(const Int8LinearArgs<T>& args, int64_t multiprocessors,
                               int capability, cudaStream_t stream,
                               Int8LinearKernel kernel = Int8LinearKernel::kAuto,
                               int64_t max_blocks = 0x7fffffff) {
  if (args.M == 0 || args.N == 0) return cudaSuccess;
  const auto quantize =
      args.scaling == RowScaling::kSymmetric    ? launch_quantize_rows<T, RowScaling::kSymmetric>
      : args.scaling == RowScaling::kAsymmetric ? launch_quantize_rows<T, RowScaling::kAsymmetric>
                                                : launch_quantize_rows<T, RowScaling::kStatic>;
  const cudaError_t error = quantize(args.x, args.x_row_stride, args.M, args.K, args.q,
                                     args.x_scales, stream, max_blocks, args.x_zeros);
  if (error != cudaSuccess) return error;

  if (kernel == Int8LinearKernel::kAuto) {
    const int own = kBuiltForSm90a && int8_linear_fits_wgmma(args) ? capability : 0;
    kernel = choose_int8_linear(args.M, args.N, multiprocessors, own);
  }
  const bool aligned = misalignment(args.weight, 16) == 0 && args.K % 16 == 0;
  switch (kernel) {
    case Int8LinearKernel::kRows1:
      return launch_int8_linear_rows<1>(args, aligned, stream);
    case Int8LinearKernel::kRows4:
      return launch_int8_linear_rows<4>(args, aligned, stream);
    case Int8LinearKernel::kRows16:
      return launch_int8_linear_rows<16>(args, aligned, stream);
    case Int8LinearKernel::kTile64:
      return aligned ? launch_int8_linear_tile<Int8Tile64, true>(args, stream)
                     : launch_int8_linear_tile<Int8Tile64, false>(args, stream);
    case Int8LinearKernel::kTile128:
      // Rows that must be read byte by byte would keep the larger tile waiting all the same.
      return aligned ? launch_int8_linear_tile<Int8Tile128, true>(args, stream)
                     : launch_int8_linear_tile<Int8Tile64, false>(args, stream);
    case Int8LinearKernel::kWgmma128:
      return launch_int8_linear_wgmma<Int8Wgmma128>(args, multiprocessors, stream);
    case Int8LinearKernel::kWgmma256:
      return launch_int8_linear_wgmma<Int8Wgmma256>(args, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace compressops
