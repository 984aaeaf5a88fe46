// winograd_conv2d on a CPU: Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A.
//
// Tiles are worked through in chunks. A chunk's transformed input V [position][tile][C] is made
// once; then each task takes 32 or 64 output channels, multiplies all positions of V by their
// weights U into M [position][tile][channels], which stays in its core's L2, and transforms that to
// pixels right away. U is read once a chunk, in the order in which it lies in memory; V comes from
// L2 or L3. With T tiles a chunk and n channels a task, every byte of U serves T/2 FLOPs and every
// byte of V n/2.
#include "winograd_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../check.h"
#include "gelu.h"
#include "winograd_conv2d_image.h"
#include "winograd_conv2d_plan.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "winograd_conv2d";

enum class Activation { kNone, kRelu, kGelu };

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  COMPRESSOPS_CHECK(name == "gelu", kOp, "activation", "'none', 'relu' or 'gelu'", name);
  return Activation::kGelu;
}

struct Task {
  const WinogradConv2dKernels& isa;
  const Shape& shape;
  const Plan& plan;
  Image x, y;
  const float* weights;  // of all groups
  const float* bias;     // [groups][padded_K], zeros where there is none
  Activation activation;

  // V of the 16 channels from `c` on, for the tiles [begin, end) of a chunk that begins at `chunk`.
  void transform_input(int64_t group, int64_t c, int64_t chunk, int64_t begin, int64_t end,
                       float* window, float* v) const {
    const int64_t channels = std::min<int64_t>(kBlock, shape.C - c);
    for_segments(shape, plan, begin, end, [&](const Segment& segment) {
      const int64_t h = segment.tile_row * shape.tile_h - shape.padding_h;
      const int64_t w = segment.tile_column * shape.tile - shape.padding_w;
      const int64_t columns = (segment.count - 1) * shape.tile + shape.alpha;
      const Window d = window_of(isa, x, segment.image, group * shape.C + c, channels, h, w,
                                 shape.alpha_h, columns, shape.H, shape.W, window);
      isa.transform_input(shape.alpha, shape.one_dimensional(), d.data, d.row_stride,
                          d.column_stride, shape.tile, segment.count,
                          v + (segment.first - chunk) * plan.v_tile + c, plan.v_position,
                          plan.v_tile);
    });
  }

  // The output channels from `k` on, at most task_channels, of the tiles [begin, end).
  void multiply(int64_t group, int64_t k, int64_t begin, int64_t end, const float* v, float* window,
                float* m) const {
    const int64_t group_floats = shape.positions() * shape.C * shape.padded_K();
    const int64_t last = std::min(k + plan.task_channels, shape.padded_K());
    for (int64_t position = 0; position < shape.positions(); ++position)
      for (int64_t panel = k; panel < last; panel += kPanel) {
        const int64_t width = std::min(kPanel, shape.padded_K() - panel);
        const float* u = weights + group * group_floats + panel * shape.positions() * shape.C +
                         position * shape.C * width;
        isa.multiply(v + position * plan.v_position, plan.v_tile, u, width, shape.C, end - begin,
                     m + position * plan.m_position + (panel - k), plan.m_tile);
      }
    for (int64_t block = k; block < std::min(last, shape.K); block += kBlock)
      transform_output(group, block, begin, end, m + (block - k), window);
  }

  void transform_output(int64_t group, int64_t k, int64_t begin, int64_t end, const float* m,
                        float* window) const {
    const int64_t channels = std::min<int64_t>(kBlock, shape.K - k);
    const float* added = bias + group * shape.padded_K() + k;
    for_segments(shape, plan, begin, end, [&](const Segment& segment) {
      const int64_t h = segment.tile_row * shape.tile_h, w = segment.tile_column * shape.tile;
      const int64_t rows = std::min<int64_t>(shape.tile_h, shape.OH - h);
      const int64_t columns = std::min<int64_t>(segment.count * shape.tile, shape.OW - w);
      char* to = y.at(segment.image, group * shape.K + k, h, w);
      const bool direct = y.direct(channels) && rows == shape.tile_h &&
                          columns == segment.count * shape.tile && activation != Activation::kGelu;
      float* pixels = direct ? reinterpret_cast<float*>(to) : window;
      const int64_t row_stride = direct ? y.strides.h : (segment.count * shape.tile) * kBlock;
      isa.transform_output(shape.alpha, shape.tile, shape.one_dimensional(),
                           m + (segment.first - begin) * plan.m_tile, plan.m_position, plan.m_tile,
                           segment.count, added, activation == Activation::kRelu, pixels,
                           row_stride, direct ? y.strides.w : kBlock);
      if (direct) return;
      if (activation == Activation::kGelu) gelu()(window, rows * row_stride);
      isa.scatter(window, row_stride, channels, rows, columns, y.element, y.strides, to);
    });
  }
};

void run(const Task& task) {
  const Shape& shape = task.shape;
  const Plan& plan = task.plan;
  const int64_t blocks = (shape.C + kBlock - 1) / kBlock;
  const int64_t tasks = (shape.K + plan.task_channels - 1) / plan.task_channels;
  const int64_t v_floats = plan.v_floats(shape), m_floats = plan.m_floats(shape);
  const int64_t window_floats = plan.window_floats(shape);
  static thread_local Scratch shared_v, own;
  const auto chunk_begin = [&](int64_t chunk) { return chunk * shape.tiles() / plan.chunks; };

  if (!plan.split_channels) {
    for_each(shape.groups * plan.chunks, [&](int64_t i) {
      float* v = own.get(v_floats + m_floats + window_floats);
      float *m = v + v_floats, *window = m + m_floats;
      const int64_t group = i / plan.chunks, chunk = i % plan.chunks;
      const int64_t t0 = chunk_begin(chunk), t1 = chunk_begin(chunk + 1);
      for (int64_t block = 0; block < blocks; ++block)
        task.transform_input(group, block * kBlock, t0, t0, t1, window, v);
      for (int64_t k = 0; k < tasks; ++k)
        task.multiply(group, k * plan.task_channels, t0, t1, v, window, m);
    });
    return;
  }
  float* v = shared_v.get(v_floats);
  for (int64_t i = 0; i < shape.groups * plan.chunks; ++i) {
    const int64_t group = i / plan.chunks, chunk = i % plan.chunks;
    const int64_t t0 = chunk_begin(chunk), t1 = chunk_begin(chunk + 1);
    for_each(blocks, [&](int64_t block) {
      float* window = own.get(m_floats + window_floats) + m_floats;
      task.transform_input(group, block * kBlock, t0, t0, t1, window, v);
    });
    for_each(tasks, [&](int64_t k) {
      float* m = own.get(m_floats + window_floats);
      task.multiply(group, k * plan.task_channels, t0, t1, v, m + m_floats, m);
    });
  }
}

std::vector<float> padded_bias(const std::optional<Tensor>& bias, const Shape& shape) {
  std::vector<float> out(shape.groups * shape.padded_K(), 0.0f);
  if (!bias) return out;
  const Tensor dense = as_contiguous(*bias);
  const Element element = element_of(kOp, *bias, "bias");
  for (int64_t k = 0; k < shape.groups * shape.K; ++k) {
    const void* data = dense.const_data_ptr();
    out[k / shape.K * shape.padded_K() + k % shape.K] =
        element == Element::kFloat ? static_cast<const float*>(data)[k]
        : element == Element::kHalf
            ? static_cast<float>(static_cast<const c10::Half*>(data)[k])
            : static_cast<float>(static_cast<const c10::BFloat16*>(data)[k]);
  }
  return out;
}

Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const Tensor& transformed,
                       const std::optional<Tensor>& bias, std::vector<int64_t> padding,
                       int64_t groups, const std::string& activation_name, int64_t tile) {
  COMPRESSOPS_CHECK(x.is_cpu() && x.dim() == 4, kOp, "x", "a CPU tensor [N, C, H, W]", x);
  const Element element = element_of(kOp, x, "x");
  COMPRESSOPS_CHECK(groups >= 1 && x.size(1) % groups == 0, kOp, "groups",
                    "a divisor of " + std::to_string(x.size(1)) + " channels", groups);
  COMPRESSOPS_CHECK(weight.dim() == 4 && weight.scalar_type() == x.scalar_type() &&
                        weight.size(1) == x.size(1) / groups && weight.size(0) % groups == 0 &&
                        weight.size(3) >= 1 &&
                        (weight.size(2) == 1 || weight.size(2) == weight.size(3)),
                    kOp, "weight",
                    "of x's dtype, [K, " + std::to_string(x.size(1) / groups) +
                        ", r, r] or [K, .., 1, r] with K a multiple of groups",
                    weight);
  const int64_t r = weight.size(3), alpha = tile + r - 1;
  COMPRESSOPS_CHECK(
      (tile == 2 || tile == 4 || tile == 6) && r >= 2 && (alpha == 4 || alpha == 6 || alpha == 8),
      kOp, "tile", "2, 4 or 6 with tile + " + std::to_string(r) + " - 1 of 4, 6 or 8", tile);
  check_padding(kOp, padding);
  const Activation activation = parse_activation(activation_name);

  const Shape shape =
      make_shape(x.size(0), weight.size(1), x.size(2), x.size(3), weight.size(0) / groups, groups,
                 weight.size(2) == 1, r, tile, padding[0], padding[1]);
  COMPRESSOPS_CHECK(shape.OH >= 1 && shape.OW >= 1, kOp, "x",
                    "at least as large as the kernel, padding included", x);
  COMPRESSOPS_CHECK(transformed.is_cpu() && transformed.scalar_type() == ScalarType::Float &&
                        transformed.dim() == 4 && transformed.size(0) == groups &&
                        transformed.size(1) == shape.padded_K() &&
                        transformed.size(2) == shape.positions() && transformed.size(3) == shape.C,
                    kOp, "transformed",
                    "a CPU float32 tensor [" + std::to_string(groups) + ", " +
                        std::to_string(shape.padded_K()) + ", " +
                        std::to_string(shape.positions()) + ", " + std::to_string(shape.C) +
                        "] as winograd_conv2d_pack makes it",
                    transformed);
  if (bias)
    COMPRESSOPS_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == weight.size(0), kOp,
                      "bias", "a CPU tensor [" + std::to_string(weight.size(0)) + "]", *bias);

  const std::vector<float> biases = padded_bias(bias, shape);
  const int64_t K = weight.size(0);
  Tensor out = new_image(x, shape.N, K, shape.OH, shape.OW, is_channels_last(x));
  if (out.numel() == 0) return out;

  const Tensor dense = as_contiguous(transformed);
  const Plan plan = make_plan(shape, torch::stable::get_num_threads());
  const Image from = image_of(x, x.const_data_ptr(), element);
  const Image to = image_of(out, out.mutable_data_ptr(), element);
  run(Task{winograd_conv2d_kernels(), shape, plan, from, to,
           static_cast<const float*>(dense.const_data_ptr()), biases.data(), activation});
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&compressops::cpu::winograd_conv2d));
}
