// Calls oneDNN 2.x's Winograd convolution for bench_winograd.py, which compiles this against the
// installed library and loads it with ctypes. Plain functions, because a handle and pointers are
// all it needs.

#include <omp.h>

#include <cstring>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <unordered_map>

namespace {

using Tag = dnnl::memory::format_tag;
using Type = dnnl::memory::data_type;

std::string last_error;

struct Convolution {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::convolution_forward conv;
  dnnl::memory src, dst;              // in the layouts that the primitive chose
  dnnl::memory plain_src, plain_dst;  // NCHW
  dnnl::reorder to_blocked, to_plain;
  std::unordered_map<int, dnnl::memory> arguments;
  std::string implementation;
};

}  // namespace

extern "C" {

const char* onednn_error() { return last_error.c_str(); }

const char* onednn_version() {
  static std::string text;
  const dnnl_version_t* version = dnnl_version();
  text = std::to_string(version->major) + "." + std::to_string(version->minor) + "." +
         std::to_string(version->patch);
  return text.c_str();
}

// Shared with torch, where both have loaded the same OpenMP library; returns what is in force.
int onednn_threads(int threads) {
  omp_set_num_threads(threads);
  return omp_get_max_threads();
}

// Input and output stay in `src` and `dst` (NCHW, owned by the caller). Null where oneDNN has no
// such convolution; onednn_error() says why.
void* onednn_create(int n, int c, int h, int w, int k, int r, int pad, float* src, float* weights,
                    float* bias, float* dst) try {
  auto out = std::make_unique<Convolution>();
  int oh = h + 2 * pad - r + 1, ow = w + 2 * pad - r + 1;
  dnnl::memory::dims xs{n, c, h, w}, ws{k, c, r, r}, ys{n, k, oh, ow}, bs{k}, ones{1, 1},
      pads{pad, pad};
  auto any = [](const dnnl::memory::dims& dims) {
    return dnnl::memory::desc(dims, Type::f32, Tag::any);
  };
  dnnl::convolution_forward::desc desc(dnnl::prop_kind::forward_inference,
                                       dnnl::algorithm::convolution_winograd, any(xs), any(ws),
                                       {bs, Type::f32, Tag::x}, any(ys), ones, pads, pads);
  dnnl::convolution_forward::primitive_desc chosen(desc, out->engine);
  out->implementation = chosen.impl_info_str();
  out->conv = dnnl::convolution_forward(chosen);

  out->plain_src = dnnl::memory({xs, Type::f32, Tag::nchw}, out->engine, src);
  out->plain_dst = dnnl::memory({ys, Type::f32, Tag::nchw}, out->engine, dst);
  out->src = dnnl::memory(chosen.src_desc(), out->engine);
  out->dst = dnnl::memory(chosen.dst_desc(), out->engine);
  out->to_blocked = dnnl::reorder(out->plain_src, out->src);
  out->to_plain = dnnl::reorder(out->dst, out->plain_dst);

  dnnl::memory plain_weights({ws, Type::f32, Tag::oihw}, out->engine, weights);
  dnnl::memory packed(chosen.weights_desc(), out->engine), biases(chosen.bias_desc(), out->engine);
  std::memcpy(biases.get_data_handle(), bias, sizeof(float) * k);
  dnnl::reorder(plain_weights, packed).execute(out->stream, plain_weights, packed);
  out->to_blocked.execute(out->stream, out->plain_src, out->src);
  out->stream.wait();
  out->arguments = {{DNNL_ARG_SRC, out->src},
                    {DNNL_ARG_WEIGHTS, packed},
                    {DNNL_ARG_BIAS, biases},
                    {DNNL_ARG_DST, out->dst}};
  return out.release();
} catch (const std::exception& error) {
  last_error = error.what();
  return nullptr;
}

const char* onednn_implementation(void* handle) {
  return static_cast<Convolution*>(handle)->implementation.c_str();
}

// The convolution alone, in blocked layouts.
void onednn_run(void* handle) {
  auto* self = static_cast<Convolution*>(handle);
  self->conv.execute(self->stream, self->arguments);
  self->stream.wait();
}

// From NCHW to NCHW: both reorders are part of it.
void onednn_run_plain(void* handle) {
  auto* self = static_cast<Convolution*>(handle);
  self->to_blocked.execute(self->stream, self->plain_src, self->src);
  self->conv.execute(self->stream, self->arguments);
  self->to_plain.execute(self->stream, self->dst, self->plain_dst);
  self->stream.wait();
}

void onednn_destroy(void* handle) { delete static_cast<Convolution*>(handle); }
}
