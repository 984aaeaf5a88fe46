// int8_conv2d: sizes, where the windows of its pixels begin, and the order of its work.
#pragma once

#include <algorithm>
#include <vector>

#include "conv.h"
#include "int8_conv2d.h"

namespace compressops::cpu {

struct ConvShape : ConvSizes {
  int64_t groups;

  bool depthwise() const { return C == groups && K == groups && groups > 1; }
  int64_t group_C() const { return C / groups; }
  int64_t group_K() const { return K / groups; }
  // Panels of 16 output channels in a group, and blocks of 4 input channels.
  int64_t panels() const {
    return ((depthwise() ? K : group_K()) + kConvColumns - 1) / kConvColumns;
  }
  int64_t blocks() const { return (group_C() + kConvDepth - 1) / kConvDepth; }
  // int8 weights of a panel.
  int64_t panel_bytes() const {
    return R * S * kConvColumns * (depthwise() ? 1 : blocks() * kConvDepth);
  }
};

// An image's codes, [rows][columns][pixel_bytes], with its padding. Of that no more is kept than a
// kernel reaches: windows that lie in it altogether are all alike.
struct ConvCodes {
  int64_t top, left, rows, columns, pixel_bytes;

  explicit ConvCodes(const ConvShape& s)
      : top(std::min(s.padding[0], s.reach_h())),
        left(std::min(s.padding[1], s.reach_w())),
        rows(s.H + 2 * top),
        columns(s.W + 2 * left),
        pixel_bytes(s.depthwise() ? (s.C + kConvDepth - 1) / kConvDepth * kConvDepth
                                  : s.groups * s.blocks() * kConvDepth) {}
  double bytes_as_double() const { return double(rows) * double(columns) * double(pixel_bytes); }
  // Vectors of 16 channels may be read that begin in the last pixel.
  int64_t bytes() const { return (rows * columns * pixel_bytes + 16 + 63) / 64 * 64; }
};

struct ConvPlan {
  // A task is up to 64 output channels of up to 54 pixels: its weights stay in L2 while the pixels
  // pass by, and 54 are as few blocks of 6 as the 49 of a 7 × 7 image. Weights that are read from
  // L1, a part of the depth at a time, gain nothing: sums would have to be stored and loaded.
  static constexpr int64_t kPixels = 9 * kConvRows;

  std::vector<int64_t> row_offsets, column_offsets;  // of the window of an output pixel
  std::vector<ConvRun> runs;

  ConvPlan(const ConvShape& s, const ConvCodes& codes) {
    const int64_t row_bytes = codes.columns * codes.pixel_bytes;
    for (int64_t h = 0; h < s.out_h(); ++h)
      row_offsets.push_back(
          (std::clamp(h * s.stride[0] - s.padding[0], -codes.top, s.H) + codes.top) * row_bytes);
    for (int64_t w = 0; w < s.out_w(); ++w)
      column_offsets.push_back(
          (std::clamp(w * s.stride[1] - s.padding[1], -codes.left, s.W) + codes.left) *
          codes.pixel_bytes);
    // Positions of a row lie side by side, unless other pixels or groups are between them.
    const bool joined = !s.depthwise() && s.groups == 1 && s.dilation[1] == 1;
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t c = 0; c < (joined ? 1 : s.S); ++c)
        runs.push_back({r * s.dilation[0] * row_bytes + c * s.dilation[1] * codes.pixel_bytes,
                        s.depthwise() ? 1 : s.blocks() * (joined ? s.S : 1)});
  }
};

}  // namespace compressops::cpu
