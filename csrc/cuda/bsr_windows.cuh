// Rows of x that are windows of images, for bsr_conv2d: those that output pixels see, in the order
// kernel row, kernel column, channel, read where they lie. What a window reaches outside its image
// is 0.
#pragma once

#include <climits>

#include "device.cuh"

namespace compressops {

// Images [N, H, W, C], each pixel on 16 bytes and whole pieces of them long. Rows and columns,
// padding included, and inputs of a window are fewer than 2^31: the launch refuses others.
struct BsrWindows {
  int H, W, C, OH, OW, S;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// Of output pixel m of M, in a piece of shared memory: the element where its image begins, in two
// words, and the row and column where its window does. Rows of pixels that are none lie outside.
__device__ __forceinline__ int4 bsr_window(const BsrWindows& windows, int64_t m, int64_t M) {
  if (m >= M) return make_int4(0, 0, INT_MIN, 0);
  const int64_t line = m / windows.OW, image = line / windows.OH;
  const int column = static_cast<int>(m - line * windows.OW);
  const int row = static_cast<int>(line - image * windows.OH);
  const int64_t first = image * windows.H * windows.W * windows.C;
  return make_int4(static_cast<int>(first), static_cast<int>(first >> 32),
                   row * windows.stride_h - windows.padding_h,
                   column * windows.stride_w - windows.padding_w);
}

// Where input k of every window lies from its first row and column on.
struct BsrTap {
  int row, column, channel;
};

__device__ __forceinline__ BsrTap bsr_tap(const BsrWindows& windows, int k) {
  const int tap = k / windows.C, row = tap / windows.S;
  return {row * windows.dilation_h, (tap - row * windows.S) * windows.dilation_w,
          k - tap * windows.C};
}

// The element of x, or -1 outside of the image.
__device__ __forceinline__ int64_t bsr_element(const BsrWindows& windows, const int4& window,
                                               const BsrTap& tap) {
  const int row = window.z + tap.row, column = window.w + tap.column;
  // A negative one is above all others as an unsigned number.
  if (static_cast<unsigned>(row) >= static_cast<unsigned>(windows.H) ||
      static_cast<unsigned>(column) >= static_cast<unsigned>(windows.W)) {
    return -1;
  }
  const int64_t first = int64_t{window.y} << 32 | static_cast<unsigned>(window.x);
  return first + (int64_t{row} * windows.W + column) * windows.C + tap.channel;
}

}  // namespace compressops
