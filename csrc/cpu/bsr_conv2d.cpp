// bsr_conv2d on a CPU: 16 pixels, side by side in a vector, times a strip of 16 outputs, whose
// sums stay in registers over all stored inputs of the strip. An input of a strip is a channel at
// one position of the kernel: 16 pixels of it are a load from the image, wherever they lie, and its
// 16 weights are broadcast, operands of the FMAs. So windows are read in place, from a copy of the
// image with its padding around it, which stays in L2; or from the image itself.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "bsr.h"
#include "bsr_conv2d_plan.h"
#include "bsr_strips.h"
#include "conv.h"
#include "linear.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "bsr_conv2d";
constexpr int64_t kMostTaps = 4096;

// 8 pixels of the result, or fewer: where their inputs are, and they themselves.
struct Half {
  int64_t from, image, pixel, count;
};

// Memory that is fetched into L2, `step` bytes by every tile: the images that come next, which
// would come from L3 or farther when they are copied.
struct Fetch {
  const char *at, *end;
  int64_t step;

  void some() {
    for (const char* stop = std::min(end, at + step); at < stop; at += 64)
      __builtin_prefetch(at, 0, 2);
  }
};

struct Job {
  const BsrLinearKernels& isa;
  const ConvSizes& sizes;
  const BsrConvLayout& layout;  // of `layout.rows` rows
  const BsrWeight& weight;
  Element element;
  bool channels_last;
  const char* x;  // contiguous in that format, as y is
  char* y;
  const float* bias;  // of all groups
  Activation activation;
  int64_t images;   // at a time
  int64_t parts;    // of the outputs
  int64_t threads;  // that share the work

  int64_t bytes() const { return element_bytes(element); }
  int64_t area() const { return layout.out_h * layout.out_w; }

  // What of a view lies in the image: `columns` from `left` on of `rows` from `top` on, which are
  // at `row` and `column` of the image.
  struct Inside {
    int64_t top, left, rows, columns, row, column;
  };

  Inside inside(int64_t first, int64_t row_view, int64_t column_view) const {
    const ConvViews &down = layout.down, &across = layout.across;
    const auto range = [](int64_t start, int64_t step, int64_t length, int64_t size) {
      const int64_t begin = start >= 0 ? 0 : std::min(length, ceil_div(-start, step));
      const int64_t end = start >= size ? begin : std::min(length, ceil_div(size - start, step));
      return std::pair(begin, std::max(begin, end));
    };
    const int64_t start = down.starts[row_view] + first * down.step;
    const int64_t column = across.starts[column_view];
    const auto [top, bottom] = range(start, down.step, layout.height(), sizes.H);
    const auto [left, right] = range(column, across.step, layout.width(), sizes.W);
    Inside in{top,
              left,
              bottom - top,
              right - left,
              start + top * down.step,
              column + left * across.step};
    // Rows without padding between them are one long one.
    if (in.columns == layout.width() && in.columns == sizes.W && down.step == 1 && across.step == 1)
      in.columns *= in.rows, in.rows = std::min<int64_t>(in.rows, 1);
    return in;
  }

  // One view of all channels; the padding is there already.
  void copy_view(int64_t n, const Inside& in, float* to) const {
    const int64_t plane = layout.plane(), width = layout.width(), W = sizes.W, C = sizes.C;
    const int64_t row_step = layout.down.step, column_step = layout.across.step;
    if (in.rows == 0 || in.columns == 0) return;
    to += in.top * width + in.left;
    if (!channels_last) {
      const char* from = x + ((n * C * sizes.H + in.row) * W + in.column) * bytes();
      for (int64_t c = 0; c < C; ++c, from += sizes.H * W * bytes(), to += plane)
        isa.copy(from, element, W * row_step, column_step, in.rows, in.columns, to, width);
      return;
    }
    for (int64_t i = 0; i < in.rows; ++i) {
      const int64_t pixel = (n * sizes.H + in.row + i * row_step) * W + in.column;
      isa.pack(x + pixel * C * bytes(), element, C * column_step, in.columns, C, to + i * width,
               in.columns, plane);
    }
  }

  void copy_image(int64_t n, int64_t first, float* to) const {
    std::fill(to, to + layout.floats(), 0.0f);
    for (int64_t i = 0; i < layout.down.count(); ++i)
      for (int64_t j = 0; j < layout.across.count(); ++j)
        copy_view(n, inside(first, i, j), to + layout.view_place(i, j));
  }

  // Where the inputs of the blocks [begin, end) lie, for output (0, 0).
  void place(int64_t begin, int64_t end, int64_t* offsets) const {
    const int64_t C = sizes.C, plane = layout.plane(), inputs = sizes.R * sizes.S * C;
    const int64_t depth = weight.depth;
    const int32_t* columns = weight.columns;
    int64_t first = 0, base = layout.tap_place(0, 0);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t column = columns[b] * depth, last = column + depth; column < last; ++column) {
        if (column >= inputs) {
          *offsets++ = C * plane;
          continue;
        }
        if (column < first || column >= first + C) {
          const int64_t tap = column / C;
          first = tap * C, base = layout.tap_place(tap / sizes.S, tap % sizes.S);
        }
        *offsets++ = base + (column - first) * plane;
      }
  }

  // Halves of the rows [first, first + rows) of some images.
  void add_halves(int64_t image, int64_t place, int64_t first, int64_t rows,
                  std::vector<Half>* halves) const {
    const int64_t joined = layout.joined() ? rows : 1, run = joined * layout.out_w;
    for (int64_t h = 0; h < rows; h += joined)
      for (int64_t w = 0; w < run; w += kHalf) {
        // A last half that is not full begins earlier where it can.
        const int64_t at = run < kHalf ? 0 : std::min(w, run - kHalf);
        const int64_t row = first + h;
        const int64_t from = (layout.in_place ? row : h) * layout.width() + at;
        halves->push_back(
            {place + from, image, row * layout.out_w + at, std::min<int64_t>(run, kHalf)});
      }
  }

  void finish(float* sums, const Half& half, int64_t i, int64_t count, int64_t output) const {
    const int64_t outputs = std::min<int64_t>(kStrip, weight.outputs - output);
    BsrFinish how{};
    how.relu = activation == Activation::kRelu;
    how.element = element;
    if (channels_last) {
      how.rows = count, how.columns = outputs, how.y_stride = weight.outputs;
      how.y = y + ((half.image * area() + half.pixel) * weight.outputs + output) * bytes();
      isa.finish(sums + i * kHalf * kStrip, how);
    } else {
      how.rows = outputs, how.columns = count, how.y_stride = area();
      how.y = y + ((half.image * weight.outputs + output) * area() + half.pixel) * bytes();
      isa.finish(sums + i * kHalf, how);
    }
  }

  // The outputs of a group, of all halves.
  void multiply(int64_t group, const float* from, const std::vector<Half>& halves,
                Fetch* fetch) const {
    static thread_local Scratch own_offsets, own_weights;
    const int64_t strips = weight.strips_of_group(), begin = weight.first_block(group);
    const int64_t end = weight.first_block(group + 1), inputs = (end - begin) * weight.depth;
    int64_t* offsets = own_offsets.get<int64_t>(inputs + 1);
    place(begin, end, offsets);
    const char* stored = weight.values + begin * weight.depth * weight.r * weight.item_bytes();
    const float* weights = reinterpret_cast<const float*>(stored);
    if (weight.element != Element::kFloat) {
      const int64_t count = inputs * weight.r;
      float* widened = own_weights.get(count + kStrip);
      isa.copy(stored, weight.element, count, 1, 1, count, widened, count);
      weights = widened;
    }
    const int64_t first = group * strips, last = std::min(first + strips, weight.strips());
    const Gelu gelu_of = activation == Activation::kGelu ? gelu() : nullptr;
    alignas(64) float sums[kStrip * kStrip + kStrip] = {}, turned[kStrip * kStrip];
    for (size_t i = 0; i < halves.size(); i += 2) {
      const Half& low = halves[i];
      const Half& high = i + 1 < halves.size() ? halves[i + 1] : low;
      const float* pixels[] = {from + low.from, from + high.from};
      fetch->some();
      for (int64_t s = first; s < last; ++s) {
        const int64_t before = (weight.starts[s] - begin) * weight.depth;
        isa.multiply_pixels(weights + before * weight.r, weight.r, offsets + before,
                            (weight.starts[s + 1] - weight.starts[s]) * weight.depth, pixels,
                            bias + s * weight.r, sums + (s - first) * weight.r * kStrip);
      }
      if (gelu_of != nullptr) gelu_of(sums, kStrip * kStrip);
      float* result = sums;
      if (channels_last) {
        isa.pack(sums, Element::kFloat, kStrip, kStrip, kStrip, turned, kStrip, kStrip);
        result = turned;
      }
      const bool joined = high.image == low.image && high.pixel == low.pixel + kHalf;
      finish(result, low, 0, joined ? low.count + high.count : low.count, group * kStrip);
      if (!joined && &high != &low) finish(result, high, 1, high.count, group * kStrip);
    }
  }

  // Those that this thread is likely to take after the images from `n` on.
  Fetch next_images(int64_t n, int64_t halves) const {
    if (layout.rows < layout.out_h || parts > 1) return {};
    const int64_t first = std::min(n + images * threads, sizes.N);
    const int64_t last = std::min(first + images, sizes.N);
    const int64_t tiles = std::max<int64_t>(1, weight.groups() * ceil_div(halves, 2));
    const int64_t image = sizes.C * sizes.H * sizes.W * bytes();
    const int64_t step = ceil_div(ceil_div((last - first) * image, tiles), 64) * 64;
    return {x + first * image, x + last * image, step};
  }

  void run_unit(int64_t unit, int64_t part) const {
    static thread_local Scratch own;
    static thread_local std::vector<Half> halves;
    const int64_t strips = ceil_div(layout.out_h, layout.rows);
    // As evenly as the strips allow: none has so few rows that halves would reach beyond an image.
    const int64_t n = unit / strips * images, strip = unit % strips;
    const int64_t least = layout.out_h / strips, longer = layout.out_h % strips;
    const int64_t first = strip * least + std::min(strip, longer);
    const int64_t rows = least + (strip < longer ? 1 : 0);
    const int64_t count = std::min(images, sizes.N - n);
    const int64_t floats = layout.in_place ? sizes.C * layout.plane() : layout.floats();
    const float* from;
    halves.clear();
    if (layout.in_place) {
      from = reinterpret_cast<const float*>(x) + n * floats;
    } else {
      // Halves may reach beyond the last pixel.
      float* copies = own.get(count * floats + kStrip);
      for (int64_t i = 0; i < count; ++i) copy_image(n + i, first, copies + i * floats);
      std::fill(copies + count * floats, copies + count * floats + kStrip, 0.0f);
      from = copies;
    }
    for (int64_t i = 0; i < count; ++i) add_halves(n + i, i * floats, first, rows, &halves);
    const int64_t end = weight.part(part + 1, parts);
    Fetch fetch = next_images(n, halves.size());
    for (int64_t group = weight.part(part, parts); group < end; ++group)
      multiply(group, from, halves, &fetch);
  }

  void run() const {
    const int64_t units = ceil_div(sizes.N, images) * ceil_div(layout.out_h, layout.rows);
    const auto task = [&](int64_t i) { run_unit(i / parts, i % parts); };
    if (threads > 1) return for_each(units * parts, task);
    for (int64_t i = 0; i < units * parts; ++i) task(i);
  }
};

// Cuts the work: images, or strips of rows, whose copies stay in L2, and parts of the outputs.
void run(Job& job, BsrConvLayout& layout) {
  constexpr int64_t kFloats = (512 << 10) / 4, kLeast = 4 * kStrip;
  const int64_t threads = torch::stable::get_num_threads(), N = job.sizes.N;
  const BsrWeight& weight = job.weight;
  const int64_t products = weight.first_block(weight.groups()) * weight.depth * weight.r / kStrip;
  // In products of a vector, which is what a cycle does: of a pixel and 16 outputs the last steps
  // take as long as 6 of them, and an input takes two cycles to be copied.
  const double work = double(N * job.area()) * double(products + 6 * weight.groups()) +
                      2.0 * double(N * job.sizes.C) * double(job.sizes.H * job.sizes.W);
  // A thread is worth starting for some 10 µs.
  const bool alone = threads == 1 || work < 50000;
  job.images = 1, job.parts = 1, job.threads = alone ? 1 : threads;
  while (layout.rows > 1 && layout.floats() > kFloats) layout.rows = ceil_div(layout.rows, 2);
  if (layout.in_place) layout.rows = layout.out_h;
  if (layout.rows == layout.out_h)
    job.images = std::clamp<int64_t>(kFloats / layout.floats(), 1, std::max<int64_t>(1, N));
  if (!alone) {
    const auto units = [&] {
      return ceil_div(N, job.images) * ceil_div(layout.out_h, layout.rows);
    };
    if (units() < 2 * threads) job.images = std::min(job.images, ceil_div(N, 2 * threads));
    while (units() < threads && layout.rows > 1 && layout.rows * layout.out_w >= 2 * kLeast)
      layout.rows = ceil_div(layout.rows, 2);
    // Each part makes a copy of its own.
    if (units() < threads)
      job.parts = ceil_div(threads, units());
    else if (units() % threads != 0 && units() < 4 * threads)
      job.parts = 2;
    job.parts = std::clamp<int64_t>(job.parts, 1, std::max<int64_t>(1, weight.groups()));
  }
  // Those of the largest strip.
  layout.rows = ceil_div(layout.out_h, ceil_div(layout.out_h, layout.rows));
  job.run();
}

Tensor bsr_conv2d(const Tensor& x, const Tensor& values, const Tensor& crow_indices,
                  const Tensor& col_indices, int64_t out_channels, std::vector<int64_t> kernel_size,
                  const std::optional<Tensor>& bias, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                  const std::string& activation, const std::optional<Tensor>& row_order) {
  check_image(kOp, x);
  const Element element = element_of(kOp, x, "x");
  const Element stored = element_of(kOp, values, "values");
  const std::string form = "two integers from 1 to " + std::to_string(kMostTaps);
  COMPRESSOPS_CHECK(kernel_size.size() == 2, kOp, "kernel_size", form,
                    std::to_string(kernel_size.size()) + " integers");
  for (int64_t taps : kernel_size)
    COMPRESSOPS_CHECK(taps >= 1 && taps <= kMostTaps, kOp, "kernel_size", form, taps);
  check_steps(kOp, stride, padding, dilation);
  COMPRESSOPS_CHECK(out_channels >= 0 && out_channels <= int64_t{1} << 40, kOp, "out_channels",
                    "from 0 to 2^40", out_channels);
  const ConvSizes sizes{x.size(0),          x.size(1),          x.size(2),      x.size(3),
                        out_channels,       kernel_size[0],     kernel_size[1], std::move(stride),
                        std::move(padding), std::move(dilation)};
  check_reach(kOp, sizes, x);
  const int64_t inputs = sizes.R * sizes.S * sizes.C;
  const BsrBlocks blocks =
      check_blocks(kOp, values, crow_indices, col_indices, out_channels, inputs, 1);
  check_row_order(kOp, row_order, blocks);
  const Activation parsed = parse_activation(kOp, activation);
  if (bias)
    COMPRESSOPS_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == out_channels, kOp,
                      "bias", "a CPU tensor [" + std::to_string(out_channels) + "]", *bias);
  std::vector<float> biases = bias ? to_float(kOp, *bias, "bias") : std::vector<float>();
  const bool channels_last = is_channels_last(x);
  const double pixels = double(sizes.out_h()) * double(sizes.out_w()) * double(sizes.N);
  COMPRESSOPS_CHECK(pixels * double(std::max<int64_t>(1, out_channels)) <= 0x1p48, kOp, "padding",
                    "such that the result has at most 2^48 elements",
                    std::to_string(sizes.padding[0]) + ", " + std::to_string(sizes.padding[1]));
  Tensor out = new_image(x, sizes.N, out_channels, sizes.out_h(), sizes.out_w(), channels_last);
  if (out.numel() == 0) return out;

  static thread_local Scratch memory;
  std::optional<BsrStrips> strips;
  if (!blocks.packed)
    strips =
        cut_strips(bsr_linear_kernels(), blocks, stored, out_channels, inputs, 1, false, memory);
  const BsrWeight weight = strips ? strips->weight : packed_weight(blocks, stored, out_channels, 1);
  const double multiplied = double(weight.first_block(weight.groups())) * double(weight.depth) *
                            weight.r / kStrip / double(sizes.C);
  BsrConvLayout layout =
      conv_layout(sizes, element, channels_last, weight.inputs != inputs, multiplied);
  COMPRESSOPS_CHECK(
      double(layout.down.count()) * double(layout.down.length(1)) * double(layout.across.count()) *
              double(layout.width()) * double(sizes.C + 1) <=
          0x1p34,
      kOp, "padding", "such that what a row of the result sees takes at most 2^36 bytes",
      std::to_string(sizes.padding[0]) + ", " + std::to_string(sizes.padding[1]));
  const Tensor dense = dense_image(x, channels_last);
  biases.resize(weight.groups() * kStrip);
  Job job{bsr_linear_kernels(),
          sizes,
          layout,
          weight,
          element,
          channels_last,
          static_cast<const char*>(dense.const_data_ptr()),
          static_cast<char*>(out.mutable_data_ptr()),
          biases.data(),
          parsed,
          1,
          1,
          1};
  run(job, layout);
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("bsr_conv2d", TORCH_BOX(&compressops::cpu::bsr_conv2d));
}
