// int8_conv2d on a CPU: each image is quantized once, to u8 codes with the channels last and the
// padding around them, and then convolved directly: windows of those codes times packed int8
// weights, in blocks of 6 pixels × 64 output channels whose sums stay in registers. Scale, bias and
// activation follow while the sums are in L1, and write them in the memory format of x. Nothing is
// unfolded.
#include "int8_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "conv.h"
#include "cpu_features.h"
#include "int8_conv2d_plan.h"
#include "linear.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "int8_conv2d";

const Int8Conv2dKernels& kernels() {
  const Features& cpu = features();
#if defined(__x86_64__)
  if (cpu.avx512_vnni) return int8_conv2d_avx512();
  if (cpu.avx2) return int8_conv2d_avx2();
#endif
  return int8_conv2d_baseline();
}

struct QuantizedImage {
  ConvQuantization to;
  float scale;  // NaN where x holds NaN or Inf
};

// An image is quantized as a row of int8_linear is.
QuantizedImage quantized(ConvRange range, const Quantization& how) {
  RowRange row;
  row.top = static_cast<uint32_t>(std::max(range.high, range.low));
  std::memcpy(&row.high, &range.high, sizeof(row.high));
  std::memcpy(&row.low, &range.low, sizeof(row.low));
  row.low = -row.low;
  QuantizedImage image;
  const RowCodes codes = row_codes(row, how, &image.scale);
  image.to = {codes.inverse, codes.zero, how.kind == Quantization::kSymmetric ? 1 : 0};
  return image;
}

template <typename T>
struct Job {
  const Int8Conv2dKernels& isa;
  const ConvShape& shape;
  const ConvCodes& layout;
  const ConvPlan& plan;
  bool channels_last;
  const T* x;  // contiguous in that format, as y is
  T* y;
  const int8_t* weight;
  const float* scales;
  const int32_t* sums;
  const float* bias;  // or null
  Activation activation;
  Quantization how;

  int64_t image_size() const { return shape.C * shape.H * shape.W; }

  // `count` elements of x as floats, in place or in `buffer`.
  const float* floats(const T* from, int64_t count, float* buffer) const {
    if constexpr (std::is_same_v<T, float>) return from;
    std::copy(from, from + count, buffer);
    return buffer;
  }

  void add_range(int64_t n, int64_t begin, int64_t end, ConvRange* range) const {
    static thread_local Scratch own;
    float* buffer = std::is_same_v<T, float> ? nullptr : own.get(end - begin);
    isa.range(floats(x + n * image_size() + begin, end - begin, buffer), end - begin, range);
  }

  // The rows [begin, end) of an image's codes, of which `top` and as many below are padding.
  void quantize(int64_t n, ConvQuantization to, int64_t begin, int64_t end, uint8_t* codes) const {
    const int64_t row_bytes = layout.columns * layout.pixel_bytes;
    for (int64_t row = begin; row < end;) {
      uint8_t* at = codes + row * row_bytes;
      const int64_t h = row - layout.top;
      int64_t rows = 1;
      if (h < 0 || h >= shape.H) {
        std::memset(at, to.offset, row_bytes);
      } else {
        // Without padding between them, rows are one long one.
        if (layout.left == 0) rows = std::min(end, layout.top + shape.H) - row;
        const int64_t side = layout.left * layout.pixel_bytes;
        std::memset(at, to.offset, side);
        quantize_rows(n, h, rows, to, at + side);
        std::memset(at + row_bytes - side, to.offset, side);
      }
      row += rows;
    }
  }

  void quantize_rows(int64_t n, int64_t h, int64_t rows, ConvQuantization to, uint8_t* at) const {
    static thread_local Scratch own;
    const int64_t pixels = rows * shape.W;
    float* buffer = std::is_same_v<T, float> ? nullptr : own.get(pixels * shape.C);
    const T* image = x + n * image_size();
    const float* values;
    int64_t step = shape.C;  // from pixel to pixel, or from plane to plane
    if (channels_last) {
      values = floats(image + h * shape.W * shape.C, pixels * shape.C, buffer);
    } else if constexpr (std::is_same_v<T, float>) {
      values = image + h * shape.W;
      step = shape.H * shape.W;
    } else {
      for (int64_t c = 0; c < shape.C; ++c)
        floats(image + (c * shape.H + h) * shape.W, pixels, buffer + c * pixels);
      values = buffer;
      step = pixels;
    }
    // max|x| may be so small that its inverse is infinite.
    const Int8Conv2dKernels& by = std::isfinite(to.inverse) ? isa : int8_conv2d_baseline();
    const auto convert = channels_last ? by.quantize_pixels : by.quantize_planes;
    const int64_t groups = shape.depthwise() ? 1 : shape.groups, channels = shape.C / groups;
    for (int64_t g = 0; g < groups; ++g)
      convert(values + g * channels * (channels_last ? 1 : step), step, channels, pixels, to,
              at + g * shape.blocks() * kConvDepth, layout.pixel_bytes);
  }

  // The output channels of `panels` panels of a group, of the pixels [begin, end).
  void multiply(const QuantizedImage& image, int64_t n, int64_t group, int64_t panel, int panels,
                int64_t begin, int64_t end, const uint8_t* codes) const {
    static thread_local Scratch own_sums, own_tile;
    constexpr int64_t kRow = kConvPanels * kConvColumns;
    int32_t* totals = own_sums.get<int32_t>(ConvPlan::kPixels * kRow);
    const uint8_t* windows[ConvPlan::kPixels];
    const int64_t out_w = shape.out_w(), pixels = end - begin;
    const bool depthwise = shape.depthwise();
    const uint8_t* first =
        codes + (depthwise ? panel * kConvColumns : group * shape.blocks() * kConvDepth);
    for (int64_t m = 0, h = begin / out_w, w = begin % out_w; m < pixels; ++m) {
      windows[m] = first + plan.row_offsets[h] + plan.column_offsets[w];
      if (++w == out_w) ++h, w = 0;
    }

    const int64_t panel_bytes = shape.panel_bytes();
    const int8_t* from = weight + (group * shape.panels() + panel) * panel_bytes;
    const int64_t parts = (pixels + kConvRows - 1) / kConvRows;
    const ConvRun* runs = plan.runs.data();
    const int64_t count = plan.runs.size();
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t m = part * pixels / parts;
      const int rows = static_cast<int>((part + 1) * pixels / parts - m);
      if (!depthwise) {
        isa.multiply(windows + m, runs, count, from, panel_bytes, rows, panels, totals + m * kRow,
                     kRow);
        continue;
      }
      for (int p = 0; p < panels; ++p) {
        const uint8_t* moved[kConvRows];
        for (int i = 0; i < rows; ++i) moved[i] = windows[m + i] + p * kConvColumns;
        isa.multiply_depthwise(moved, runs, count, from + p * panel_bytes, rows,
                               totals + m * kRow + p * kConvColumns, kRow);
      }
    }
    finish(image, n, group, panel, panels, begin, end, totals, own_tile);
  }

  void finish(const QuantizedImage& image, int64_t n, int64_t group, int64_t panel, int panels,
              int64_t begin, int64_t end, const int32_t* totals, Scratch& own) const {
    constexpr int64_t kRow = kConvPanels * kConvColumns;
    const int64_t group_K = shape.depthwise() ? shape.K : shape.group_K();
    const int64_t first = panel * kConvColumns, k = group * group_K + first;
    const int64_t columns = std::min<int64_t>(panels * kConvColumns, group_K - first);
    const int64_t pixels = end - begin, area = shape.out_h() * shape.out_w();
    const ConvOutput output = {image.scale,
                               image.to.offset,
                               scales + k,
                               sums + k,
                               bias == nullptr ? nullptr : bias + k,
                               activation == Activation::kRelu};
    const int64_t pixel_stride = channels_last ? shape.K : 1;
    const int64_t channel_stride = channels_last ? 1 : area;
    T* out = y + n * shape.K * area + begin * pixel_stride + k * channel_stride;
    if constexpr (std::is_same_v<T, float>) {
      if (activation != Activation::kGelu) {
        isa.finish(totals, kRow, pixels, columns, output, out, pixel_stride, channel_stride);
        return;
      }
    }
    float* tile = own.get(ConvPlan::kPixels * kRow);
    const int64_t lines = channels_last ? pixels : columns;
    const int64_t length = channels_last ? columns : pixels;
    isa.finish(totals, kRow, pixels, columns, output, tile, channels_last ? columns : 1,
               channels_last ? 1 : pixels);
    if (activation == Activation::kGelu) gelu()(tile, lines * length);
    for (int64_t i = 0; i < lines; ++i)
      std::copy(tile + i * length, tile + (i + 1) * length,
                out + i * (channels_last ? pixel_stride : channel_stride));
  }

  // Images are worked on together while their codes fit L2.
  void run() const {
    static thread_local Scratch shared;
    constexpr int64_t kPiece = 16384;
    const int64_t bytes = layout.bytes(), area = shape.out_h() * shape.out_w();
    const int64_t at_once = std::clamp<int64_t>((1 << 20) / bytes, 1, shape.N);
    uint8_t* codes = shared.get<uint8_t>(at_once * bytes);
    const int64_t pieces = (image_size() + kPiece - 1) / kPiece;
    const int64_t bands = std::min(layout.rows, pieces);
    const int64_t groups = shape.depthwise() ? 1 : shape.groups;
    const int64_t stacks = (shape.panels() + kConvPanels - 1) / kConvPanels;
    const int64_t chunks = (area + ConvPlan::kPixels - 1) / ConvPlan::kPixels;

    std::vector<ConvRange> ranges(at_once * pieces);
    std::vector<QuantizedImage> images(at_once);
    for (int64_t n0 = 0; n0 < shape.N; n0 += at_once) {
      const int64_t count = std::min(at_once, shape.N - n0);
      for_each(count * pieces, [&](int64_t i) {
        const int64_t begin = i % pieces * kPiece;
        ranges[i] = {0, 0};
        add_range(n0 + i / pieces, begin, std::min(begin + kPiece, image_size()), &ranges[i]);
      });
      for (int64_t i = 0; i < count; ++i) {
        ConvRange all = {0, 0};
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const ConvRange& range = ranges[i * pieces + piece];
          all = {std::max(all.high, range.high), std::max(all.low, range.low)};
        }
        images[i] = quantized(all, how);
      }
      for_each(count * bands, [&](int64_t i) {
        const int64_t band = i % bands, n = i / bands;
        const int64_t begin = band * layout.rows / bands, end = (band + 1) * layout.rows / bands;
        if (std::isnan(images[n].scale))  // which makes the result NaN, whatever the codes
          std::memset(codes + n * bytes + begin * layout.columns * layout.pixel_bytes, 0,
                      (end - begin) * layout.columns * layout.pixel_bytes);
        else
          quantize(n0 + n, images[n].to, begin, end, codes + n * bytes);
      });
      for_each(groups * stacks * count * chunks, [&](int64_t i) {
        const int64_t chunk = i % chunks, n = i / chunks % count;
        const int64_t stack = i / chunks / count % stacks, group = i / chunks / count / stacks;
        const int64_t panel = stack * kConvPanels;
        const int panels = (int)std::min<int64_t>(kConvPanels, shape.panels() - panel);
        multiply(images[n], n0 + n, group, panel, panels, chunk * area / chunks,
                 (chunk + 1) * area / chunks, codes + n * bytes);
      });
    }
  }
};

// Weights [K, C / groups, R, S] are packed for this call; others are taken as they are.
Tensor packed_weight(const Tensor& weight, const ConvShape& s) {
  const Tensor dense = as_contiguous(weight);
  if (weight.dim() != 4) return dense;
  const int64_t groups = s.depthwise() ? 1 : s.groups, K = s.K / groups, C = s.group_C();
  const int64_t depth = s.depthwise() ? 1 : kConvDepth, blocks = (C + depth - 1) / depth;
  const Tensor out = torch::stable::new_zeros(dense, {groups * s.panels() * s.panel_bytes()});
  const int8_t* from = static_cast<const int8_t*>(dense.const_data_ptr());
  int8_t* to = static_cast<int8_t*>(out.mutable_data_ptr());
  for (int64_t k = 0; k < s.K; ++k) {
    const int64_t column = k % K;
    int8_t* panel = to + (k / K * s.panels() + column / kConvColumns) * s.panel_bytes();
    for (int64_t c = 0; c < C; ++c)
      for (int64_t t = 0; t < s.R * s.S; ++t)
        panel[((t * blocks + c / depth) * kConvColumns + column % kConvColumns) * depth +
              c % depth] = *from++;
  }
  return out;
}

// The kernel size, of weights in any of their three forms.
ConvShape checked_shape(const Tensor& x, const Tensor& weight, int64_t K,
                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, int64_t groups) {
  check_image(kOp, x);
  check_steps(kOp, stride, padding, dilation);
  COMPRESSOPS_CHECK(groups >= 1 && x.size(1) % groups == 0 && K % groups == 0, kOp, "groups",
                    "a divisor of " + std::to_string(x.size(1)) + " input and " +
                        std::to_string(K) + " output channels",
                    groups);
  const int64_t dims = weight.dim(), first = dims == 5 ? 1 : 2;
  const bool form = weight.is_cpu() && weight.scalar_type() == ScalarType::Char &&
                    (dims == 4 || dims == 5 || dims == 7);
  constexpr const char* kForm =
      "a CPU int8 tensor [K, C / groups, R, S] or as int8_conv2d_pack makes it";
  COMPRESSOPS_CHECK(form, kOp, "weight", kForm, weight);
  const ConvShape s = {
      {x.size(0), x.size(1), x.size(2), x.size(3), K, weight.size(first), weight.size(first + 1),
       std::move(stride), std::move(padding), std::move(dilation)},
      groups};
  std::vector<int64_t> expected = {K, s.group_C(), s.R, s.S};
  if (dims == 5) expected = {s.panels(), s.R, s.S, kConvColumns, 1};
  if (dims == 7) expected = {groups, s.panels(), s.R, s.S, s.blocks(), kConvColumns, kConvDepth};
  bool fits = s.R >= 1 && s.S >= 1 && s.R <= kMaxTerms && s.S <= kMaxTerms &&
              (dims == 4 || s.depthwise() == (dims == 5));
  for (int64_t i = 0; i < dims; ++i) fits = fits && weight.size(i) == expected[i];
  COMPRESSOPS_CHECK(fits, kOp, "weight",
                    std::string(kForm) + " for K = " + std::to_string(K) +
                        ", C / groups = " + std::to_string(s.group_C()),
                    weight);
  check_reach(kOp, s, x);
  return s;
}

Tensor int8_conv2d(const Tensor& x, const Tensor& weight, const Tensor& weight_scales,
                   const Tensor& weight_sums, const std::optional<Tensor>& bias,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups,
                   const std::string& activation_name, const std::optional<Tensor>& x_scale,
                   const std::optional<Tensor>& x_zero, bool symmetric) {
  COMPRESSOPS_CHECK(weight_scales.is_cpu() && weight_scales.dim() == 1 &&
                        weight_scales.size(0) >= 1 &&
                        weight_scales.scalar_type() == ScalarType::Float,
                    kOp, "weight_scales", "a CPU float32 tensor [K], K >= 1", weight_scales);
  const int64_t K = weight_scales.size(0);
  const ConvShape shape = checked_shape(x, weight, K, std::move(stride), std::move(padding),
                                        std::move(dilation), groups);
  const Quantization how = quantization_of(kOp, x_scale, x_zero, symmetric);
  const int64_t most = max_terms(how);
  COMPRESSOPS_CHECK(shape.R * shape.S <= most && shape.group_C() * shape.R * shape.S <= most, kOp,
                    "weight", "of at most " + std::to_string(most) + " inputs an output", weight);
  COMPRESSOPS_CHECK(weight_sums.is_cpu() && weight_sums.dim() == 1 && weight_sums.size(0) == K &&
                        weight_sums.scalar_type() == ScalarType::Int,
                    kOp, "weight_sums", "a CPU int32 tensor [" + std::to_string(K) + "]",
                    weight_sums);
  if (bias)
    COMPRESSOPS_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == K, kOp, "bias",
                      "a CPU tensor [" + std::to_string(K) + "]", *bias);
  const Activation activation = parse_activation(kOp, activation_name);
  with_element_type(kOp, x, "x", [](auto*) {});
  const std::vector<float> biases = bias ? to_float(kOp, *bias, "bias") : std::vector<float>();
  const ConvCodes layout(shape);
  // So that sizes cannot overflow before they are asked for as memory.
  COMPRESSOPS_CHECK(layout.bytes_as_double() <= double(int64_t{1} << 36), kOp, "padding",
                    "such that an image with it takes at most 2^36 bytes",
                    std::to_string(shape.padding[0]) + ", " + std::to_string(shape.padding[1]));

  const bool channels_last = is_channels_last(x);
  Tensor out = new_image(x, shape.N, K, shape.out_h(), shape.out_w(), channels_last);
  if (out.numel() == 0) return out;

  const Tensor dense_x = dense_image(x, channels_last);
  const Tensor panels = packed_weight(weight, shape);
  const Tensor scales = as_contiguous(weight_scales);
  const Tensor sums = as_contiguous(weight_sums);
  const ConvPlan plan(shape, layout);
  with_element_type(kOp, x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Job<T>{kernels(),
           shape,
           layout,
           plan,
           channels_last,
           static_cast<const T*>(dense_x.const_data_ptr()),
           static_cast<T*>(out.mutable_data_ptr()),
           static_cast<const int8_t*>(panels.const_data_ptr()),
           static_cast<const float*>(scales.const_data_ptr()),
           static_cast<const int32_t*>(sums.const_data_ptr()),
           biases.empty() ? nullptr : biases.data(),
           activation,
           how}
        .run();
  });
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("int8_conv2d", TORCH_BOX(&compressops::cpu::int8_conv2d));
}
