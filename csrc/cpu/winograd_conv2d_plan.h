// How winograd_conv2d and its gradient cut their work: see the head of winograd_conv2d.cpp.
#pragma once

#include <algorithm>

#include "winograd_conv2d.h"

namespace compressops::cpu {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Floats a row, at least `floats`, so that rows are an odd number of cache lines apart: tiles or
// positions at a power of two would all fall into the same few sets of a cache.
inline int64_t odd_lines(int64_t floats) {
  const int64_t lines = (floats + kBlock - 1) / kBlock;
  return (lines | 1) * kBlock;
}

struct Shape {
  int64_t N, C, H, W;  // input; C and K are those of one group
  int64_t K, OH, OW;   // output
  int64_t groups;
  int64_t padding_h, padding_w;
  int alpha_h, alpha, tile_h, tile;
  int64_t tile_rows, tile_columns;

  bool one_dimensional() const { return alpha_h == 1; }
  int64_t positions() const { return int64_t{alpha_h} * alpha; }
  int64_t tiles() const { return N * tile_rows * tile_columns; }
  int64_t padded_K() const { return round_up(K, kBlock); }
};

inline Shape make_shape(int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t groups,
                        bool one_dimensional, int64_t r, int64_t tile, int64_t padding_h,
                        int64_t padding_w) {
  Shape shape;
  shape.N = N, shape.C = C, shape.H = H, shape.W = W, shape.K = K, shape.groups = groups;
  shape.padding_h = padding_h, shape.padding_w = padding_w;
  shape.alpha = (int)(tile + r - 1), shape.alpha_h = one_dimensional ? 1 : shape.alpha;
  shape.tile = (int)tile, shape.tile_h = one_dimensional ? 1 : shape.tile;
  shape.OH = H + 2 * padding_h - (one_dimensional ? 1 : r) + 1;
  shape.OW = W + 2 * padding_w - r + 1;
  shape.tile_rows = (shape.OH + shape.tile_h - 1) / shape.tile_h;
  shape.tile_columns = (shape.OW + tile - 1) / tile;
  return shape;
}

// How the work is cut.
struct Plan {
  int64_t chunks;
  int64_t most_tiles;     // of a chunk
  int64_t task_channels;  // output channels a task
  bool split_channels;    // threads share a chunk's channels, or take chunks of their own
  int64_t v_tile, v_position, m_tile, m_position;  // strides
  int64_t segment_tiles;                           // tiles side by side that go through one window

  int64_t v_floats(const Shape& shape) const { return shape.positions() * v_position; }
  int64_t m_floats(const Shape& shape) const { return shape.positions() * m_position; }
  int64_t window_floats(const Shape& shape) const {
    return shape.alpha_h * (segment_tiles * shape.tile + shape.alpha + kBlock) * kBlock;
  }
};

inline Plan make_plan(const Shape& shape, int64_t threads) {
  Plan plan;
  const int64_t weight_bytes = shape.positions() * shape.C * shape.padded_K() * 4;
  // Weights that do not stay in cache beside the rest want many tiles to serve each time.
  const bool heavy = weight_bytes > (4 << 20);
  plan.task_channels = std::min(kPanel, round_up(shape.K, kBlock));
  plan.m_tile = odd_lines(plan.task_channels);
  // M, and where the weights are light V too, in a share of the L2 of most processors; V in 16 MB
  // however many channels there are.
  const int64_t m_bytes = shape.positions() * plan.m_tile * 4;
  const int64_t v_bytes = shape.positions() * odd_lines(shape.C) * 4;
  const int64_t fit =
      std::max<int64_t>(1, std::min((heavy ? 448 << 10 : 192 << 10) / m_bytes / kMaxTileRows,
                                    (16 << 20) / v_bytes / kMaxTileRows)) *
      kMaxTileRows;
  const int64_t tiles = shape.tiles();
  plan.chunks = (tiles + fit - 1) / fit;
  const int64_t tasks = (shape.K + plan.task_channels - 1) / plan.task_channels;
  // Chunks of their own keep threads from waiting for each other, as long as each has tiles enough
  // to be worth reading the weights for.
  plan.split_channels = threads > 1 && tasks > 1 && tiles < threads * (heavy ? 48 : 24);
  if (!plan.split_channels)
    plan.chunks =
        round_up(plan.chunks, std::min(threads, (tiles + kMaxTileRows - 1) / kMaxTileRows));
  plan.most_tiles = (tiles + plan.chunks - 1) / plan.chunks;
  plan.v_tile = odd_lines(shape.C);
  plan.v_position = odd_lines(plan.most_tiles * plan.v_tile);
  plan.m_position = odd_lines(plan.most_tiles * plan.m_tile);
  plan.segment_tiles = std::max(1, (64 - (shape.alpha - shape.tile)) / shape.tile);
  return plan;
}

// Tiles side by side in one row of tiles of one image.
struct Segment {
  int64_t image, tile_row, tile_column, first, count;  // `first` of all tiles
};

// Calls f(segment) for the segments of tiles [begin, end).
template <typename F>
void for_segments(const Shape& shape, const Plan& plan, int64_t begin, int64_t end, F&& f) {
  while (begin < end) {
    const int64_t column = begin % shape.tile_columns, row = begin / shape.tile_columns;
    const int64_t count = std::min({shape.tile_columns - column, end - begin, plan.segment_tiles});
    f(Segment{row / shape.tile_rows, row % shape.tile_rows, column, begin, count});
    begin += count;
  }
}

}  // namespace compressops::cpu
