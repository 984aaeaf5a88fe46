// bsr_conv2d: how an image lies in memory while it is convolved, and the order of the work.
#pragma once

#include <algorithm>
#include <vector>

#include "bsr.h"
#include "conv.h"

namespace compressops::cpu {

// One dimension of an image as the taps of a kernel see it: copies ("views") of every `step`-th
// position, from starts[view] on. Output i of tap t is at shift[t] + i of view[t].
struct ConvViews {
  std::vector<int64_t> starts, view, shift;
  int64_t step, most_shift = 0;

  // Taps share the views that have their positions; `apart`: each tap has its own, and no shift.
  ConvViews(int64_t taps, int64_t stride, int64_t padding, int64_t dilation, bool apart)
      : step(stride) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t shifts = apart ? 0 : t * dilation / stride;
      const int64_t start = t * dilation - shifts * stride - padding;
      const auto found = std::find(starts.begin(), starts.end(), start);
      view.push_back(found - starts.begin());
      if (found == starts.end()) starts.push_back(start);
      shift.push_back(shifts);
      most_shift = std::max(most_shift, shifts);
    }
  }
  int64_t count() const { return starts.size(); }
  int64_t length(int64_t outputs) const { return outputs + most_shift; }
  // The one of fewer positions. Where views are shared, most_shift counts for all of them.
  static ConvViews shortest(int64_t taps, int64_t stride, int64_t padding, int64_t dilation,
                            int64_t outputs) {
    ConvViews shared(taps, stride, padding, dilation, false);
    if (shared.count() * shared.length(outputs) <= taps * outputs) return shared;
    return ConvViews(taps, stride, padding, dilation, true);
  }
};

// An image, or some of its rows, as floats: [C][row views][column views][rows][width], which the
// kernels read in halves of 8 outputs side by side.
struct BsrConvLayout {
  const ConvSizes* sizes;
  ConvViews down, across;
  int64_t out_h, out_w, rows;  // rows: of the result, that are made from it
  bool zeros;                  // one more channel, of zeros
  // Windows lie in x itself, [C][H][W].
  bool in_place;

  int64_t height() const { return down.length(rows); }
  int64_t width() const { return in_place ? sizes->W : across.length(out_w); }
  int64_t plane() const {
    if (in_place) return sizes->H * sizes->W;
    const int64_t floats =
        (down.count() * across.count() * height() * width() + kStrip - 1) / kStrip * kStrip;
    // Planes a whole number of kilobytes apart would share a few sets of the caches.
    return floats % 256 == 0 ? floats + kStrip : floats;
  }
  int64_t floats() const { return (sizes->C + (zeros ? 1 : 0)) * plane(); }
  // Rows of the result follow each other as they lie there.
  bool joined() const { return width() == out_w; }
  int64_t halves() const {
    return joined() ? ceil_div(rows * out_w, kHalf) : rows * ceil_div(out_w, kHalf);
  }
  int64_t view_place(int64_t row_view, int64_t column_view) const {
    return (row_view * across.count() + column_view) * height() * width();
  }
  // Where output (0, 0) of a tap is.
  int64_t tap_place(int64_t r, int64_t s) const {
    return view_place(down.view[r], across.view[s]) + down.shift[r] * width() + across.shift[s];
  }
};

// `multiplied`: how many times an input meets 16 outputs, on average; a measure of what a half is
// worth beside the copying.
inline BsrConvLayout conv_layout(const ConvSizes& s, Element element, bool channels_last,
                                 bool zeros, double multiplied) {
  const auto axis = [&](int i, bool apart) {
    const int64_t taps = i == 0 ? s.R : s.S, out = i == 0 ? s.out_h() : s.out_w();
    if (apart) return ConvViews(taps, s.stride[i], s.padding[i], s.dilation[i], true);
    return ConvViews::shortest(taps, s.stride[i], s.padding[i], s.dilation[i], out);
  };
  BsrConvLayout shared{&s,        axis(0, false), axis(1, false), s.out_h(),
                       s.out_w(), s.out_h(),      zeros,          false};
  BsrConvLayout apart = shared;
  apart.across = axis(1, true);
  // In cycles, a channel: two vectors a row are read and written, and 8 products of a half are
  // half of a vector's 16.
  const auto cost = [&](const BsrConvLayout& l) {
    const double copied = double(l.down.count() * l.across.count()) * double(l.height());
    return copied * double(4 + 2 * ceil_div(l.width(), kStrip)) +
           multiplied * kHalf * double(l.halves());
  };
  const bool plain = s.stride[0] == 1 && s.stride[1] == 1 && s.padding[0] == 0 && s.padding[1] == 0;
  if (plain && element == Element::kFloat && !channels_last && !zeros) {
    BsrConvLayout whole = shared;
    whole.in_place = true;
    // A last half that is not full begins earlier.
    const bool fits = whole.joined() ? s.out_h() * s.out_w() >= kHalf : s.out_w() >= kHalf;
    const bool shared_views = whole.down.count() == 1 && whole.across.count() == 1;
    if (fits && shared_views && whole.halves() <= apart.halves() * 1.1) return whole;
  }
  return cost(apart) < cost(shared) ? apart : shared;
}

}  // namespace compressops::cpu
