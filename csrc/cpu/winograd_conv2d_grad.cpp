// winograd_conv2d_grad on a CPU: the gradient of the transformed weights, U' = Σ V ⊙ M' over the
// tiles, with V = Bᵀ d B of the input and M' = A y' Aᵀ of the output's gradient. For each position
// that is a product [K, tiles] × [tiles, C]. Threads take chunks of tiles and sum into their own
// U'.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "winograd_conv2d_image.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "winograd_conv2d_grad";

struct Gradient {
  const WinogradConv2dKernels& isa;
  const Shape& shape;
  const Plan& plan;  // its m_tile holds all output channels here
  Image x, grad;

  int64_t u_row() const { return round_up(shape.C, kBlock); }
  int64_t u_floats() const { return shape.positions() * shape.K * u_row(); }

  int64_t c_blocks() const { return (shape.C + kBlock - 1) / kBlock; }
  int64_t k_blocks() const { return (shape.K + kBlock - 1) / kBlock; }

  // V (block < c_blocks()) or M' of 16 channels, of the tiles [begin, end) of one group.
  void transform(int64_t group, int64_t block, int64_t begin, int64_t end, float* v, float* m,
                 float* window) const {
    const bool of_x = block < c_blocks();
    const int64_t c = (of_x ? block : block - c_blocks()) * kBlock;
    const int64_t channels = std::min<int64_t>(kBlock, (of_x ? shape.C : shape.K) - c);
    for_segments(shape, plan, begin, end, [&](const Segment& segment) {
      const int64_t h = segment.tile_row * shape.tile_h, w = segment.tile_column * shape.tile;
      const int64_t tile = segment.first - begin;
      if (of_x) {
        const Window d =
            window_of(isa, x, segment.image, group * shape.C + c, channels, h - shape.padding_h,
                      w - shape.padding_w, shape.alpha_h,
                      (segment.count - 1) * shape.tile + shape.alpha, shape.H, shape.W, window);
        isa.transform_input(shape.alpha, shape.one_dimensional(), d.data, d.row_stride,
                            d.column_stride, shape.tile, segment.count, v + tile * plan.v_tile + c,
                            plan.v_position, plan.v_tile);
      } else {
        const Window y =
            window_of(isa, grad, segment.image, group * shape.K + c, channels, h, w, shape.tile_h,
                      segment.count * shape.tile, shape.OH, shape.OW, window);
        isa.transform_gradient(shape.alpha, shape.tile, shape.one_dimensional(), y.data,
                               y.row_stride, y.column_stride, segment.count,
                               m + tile * plan.m_tile + c, plan.m_position, plan.m_tile);
      }
    });
  }

  // Adds the products of `tiles` tiles at one position to u [position][K][u_row].
  void multiply(int64_t position, int64_t tiles, const float* v, const float* m, float* u) const {
    isa.multiply_transposed(m + position * plan.m_position, plan.m_tile,
                            v + position * plan.v_position, plan.v_tile, tiles, shape.K, u_row(),
                            u + position * shape.K * u_row(), u_row());
  }
};

// U' of all threads that sum apart; beyond that they work on one.
constexpr int64_t kMostBytesApart = 64 << 20;

Plan make_gradient_plan(const Shape& shape, int64_t threads) {
  Plan plan = make_plan(shape, threads);
  // A chunk reads and writes all of U', and V and M' once: with heavy weights, more tiles a chunk.
  const int64_t u_bytes = shape.positions() * round_up(shape.C, kBlock) * shape.K * 4;
  const int64_t tiles = shape.tiles();
  const int64_t most = std::min<int64_t>(u_bytes > (1 << 20) ? 96 : 48, plan.most_tiles * 2);
  plan.chunks = round_up((tiles + most - 1) / most, std::min(threads, tiles));
  plan.split_channels = threads > 1 && std::min(threads, plan.chunks) * u_bytes > kMostBytesApart;
  if (plan.split_channels) plan.chunks = (tiles + most - 1) / most;
  plan.most_tiles = (tiles + plan.chunks - 1) / plan.chunks;
  plan.v_position = odd_lines(plan.most_tiles * plan.v_tile);
  plan.m_tile = odd_lines(shape.K);
  plan.m_position = odd_lines(plan.most_tiles * plan.m_tile);
  return plan;
}

// U' of one group in parts [threads][position][K][u_row]: threads take chunks of tiles.
Tensor apart(const Gradient& gradient, int64_t group, const Tensor& like) {
  const Shape& shape = gradient.shape;
  const Plan& plan = gradient.plan;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), plan.chunks);
  const int64_t v_floats = plan.v_floats(shape), m_floats = plan.m_floats(shape);
  const Tensor sums =
      torch::stable::new_zeros(like, {workers, gradient.u_floats()}, ScalarType::Float);
  float* u = static_cast<float*>(sums.mutable_data_ptr());
  static thread_local Scratch own;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    float* v = own.get(v_floats + m_floats + plan.window_floats(shape));
    float *m = v + v_floats, *window = m + m_floats;
    for (int64_t chunk = next++; chunk < plan.chunks; chunk = next++) {
      const int64_t begin = chunk * shape.tiles() / plan.chunks;
      const int64_t end = (chunk + 1) * shape.tiles() / plan.chunks;
      for (int64_t block = 0; block < gradient.c_blocks() + gradient.k_blocks(); ++block)
        gradient.transform(group, block, begin, end, v, m, window);
      for (int64_t position = 0; position < shape.positions(); ++position)
        gradient.multiply(position, end - begin, v, m, u + worker * gradient.u_floats());
    }
  });
  return sums;
}

// U' of one group [1][position][K][u_row]: threads share a chunk's channels and positions.
Tensor together(const Gradient& gradient, int64_t group, const Tensor& like) {
  const Shape& shape = gradient.shape;
  const Plan& plan = gradient.plan;
  const Tensor sums = torch::stable::new_zeros(like, {1, gradient.u_floats()}, ScalarType::Float);
  float* u = static_cast<float*>(sums.mutable_data_ptr());
  static thread_local Scratch shared, own;
  float* v = shared.get(plan.v_floats(shape) + plan.m_floats(shape));
  float* m = v + plan.v_floats(shape);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t begin = chunk * shape.tiles() / plan.chunks;
    const int64_t end = (chunk + 1) * shape.tiles() / plan.chunks;
    for_each(gradient.c_blocks() + gradient.k_blocks(), [&](int64_t block) {
      gradient.transform(group, block, begin, end, v, m, own.get(plan.window_floats(shape)));
    });
    for_each(shape.positions(),
             [&](int64_t position) { gradient.multiply(position, end - begin, v, m, u); });
  }
  return sums;
}

Tensor winograd_conv2d_grad(const Tensor& x, const Tensor& grad, std::vector<int64_t> kernel_size,
                            std::vector<int64_t> padding, int64_t groups, int64_t tile) {
  COMPRESSOPS_CHECK(x.is_cpu() && x.dim() == 4, kOp, "x", "a CPU tensor [N, C, H, W]", x);
  const Element element = element_of(kOp, x, "x");
  COMPRESSOPS_CHECK(groups >= 1 && x.size(1) % groups == 0, kOp, "groups",
                    "a divisor of " + std::to_string(x.size(1)) + " channels", groups);
  COMPRESSOPS_CHECK(
      kernel_size.size() == 2 && (kernel_size[0] == 1 || kernel_size[0] == kernel_size[1]), kOp,
      "kernel_size", "r, r or 1, r", kernel_size.empty() ? 0 : kernel_size[0]);
  const int64_t r = kernel_size[1], alpha = tile + r - 1;
  COMPRESSOPS_CHECK(
      (tile == 2 || tile == 4 || tile == 6) && r >= 2 && (alpha == 4 || alpha == 6 || alpha == 8),
      kOp, "tile", "2, 4 or 6 with tile + " + std::to_string(r) + " - 1 of 4, 6 or 8", tile);
  check_padding(kOp, padding);
  const int64_t OH = x.size(2) + 2 * padding[0] - kernel_size[0] + 1;
  const int64_t OW = x.size(3) + 2 * padding[1] - r + 1;
  COMPRESSOPS_CHECK(grad.is_cpu() && grad.dim() == 4 && grad.scalar_type() == x.scalar_type() &&
                        grad.size(0) == x.size(0) && grad.size(1) % groups == 0 &&
                        grad.size(2) == OH && grad.size(3) == OW,
                    kOp, "grad",
                    "of x's dtype, [" + std::to_string(x.size(0)) + ", K, " + std::to_string(OH) +
                        ", " + std::to_string(OW) + "] with K a multiple of groups",
                    grad);

  const Shape shape =
      make_shape(x.size(0), x.size(1) / groups, x.size(2), x.size(3), grad.size(1) / groups, groups,
                 kernel_size[0] == 1, r, tile, padding[0], padding[1]);
  Tensor out =
      torch::stable::new_zeros(x, {shape.positions(), grad.size(1), shape.C}, ScalarType::Float);
  if (out.numel() == 0 || grad.numel() == 0) return out;

  const int64_t threads = torch::stable::get_num_threads();
  const Plan plan = make_gradient_plan(shape, threads);
  const Gradient gradient{winograd_conv2d_kernels(), shape, plan,
                          image_of(x, x.const_data_ptr(), element),
                          image_of(grad, grad.const_data_ptr(), element)};
  float* result = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t group = 0; group < groups; ++group) {
    const Tensor sums =
        plan.split_channels ? together(gradient, group, x) : apart(gradient, group, x);
    const float* u = static_cast<const float*>(sums.const_data_ptr());
    const int64_t workers = sums.size(0), row = gradient.u_row();
    torch::stable::parallel_for(
        0, shape.positions() * shape.K, 64, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t position = i / shape.K, k = i % shape.K;
            float* to = result + ((position * groups + group) * shape.K + k) * shape.C;
            for (int64_t worker = 0; worker < workers; ++worker) {
              const float* from = u + worker * gradient.u_floats() + i * row;
              for (int64_t c = 0; c < shape.C; ++c) to[c] += from[c];
            }
          }
        });
  }
  return out;
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("winograd_conv2d_grad", TORCH_BOX(&compressops::cpu::winograd_conv2d_grad));
}
