// merge_planes on a CPU: planes of bytes to the codes of floats, in vectors of the processor's.
#include "merge_planes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu_features.h"
#include "merge_planes_op.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "merge_planes";
// Codes to a task: some microseconds of work.
constexpr int64_t kGrain = 1 << 16;

void merge_planes(Tensor out, std::vector<Tensor> planes, bool turned) {
  const int64_t bytes = merged_bytes(out);
  COMPRESSOPS_CHECK(bytes != 0, kOp, "out", "a contiguous CPU vector of 2 or 4 bytes an element",
                    out);
  COMPRESSOPS_CHECK(static_cast<int64_t>(planes.size()) == bytes, kOp, "planes",
                    std::to_string(bytes) + " tensors, as out has bytes an element",
                    static_cast<int64_t>(planes.size()));
  const int64_t count = out.numel();
  const uint8_t* data[4] = {};
  for (int64_t p = 0; p < bytes; ++p) {
    const Tensor& plane = planes[p];
    COMPRESSOPS_CHECK(plane.is_cpu() && plane.scalar_type() == ScalarType::Byte &&
                          plane.dim() == 1 && plane.numel() == count && plane.is_contiguous(),
                      kOp, "planes", "contiguous CPU uint8 tensors [" + std::to_string(count) + "]",
                      plane);
    data[p] = static_cast<const uint8_t*>(plane.const_data_ptr());
  }
  void* codes = out.mutable_data_ptr();
  const MergePlanesKernels& isa = merge_planes_kernels();
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    const uint8_t* from[4] = {};
    for (int64_t p = 0; p < bytes; ++p) from[p] = data[p] + begin;
    if (bytes == 2)
      isa.two(static_cast<uint16_t*>(codes) + begin, from, end - begin, turned, false);
    else
      isa.four(static_cast<uint32_t*>(codes) + begin, from, end - begin, turned, false);
  });
}

}  // namespace

const MergePlanesKernels& merge_planes_kernels() {
#if defined(__x86_64__)
  if (features().avx512) return merge_planes_avx512();
  if (features().avx2) return merge_planes_avx2();
#endif
  return merge_planes_baseline();
}

int64_t merged_bytes(const Tensor& out) {
  if (!out.is_cpu() || out.dim() != 1 || !out.is_contiguous()) return 0;
  switch (out.scalar_type()) {
    case ScalarType::Short:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Int:
    case ScalarType::Float:
      return 4;
    default:
      return 0;
  }
}

}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("merge_planes", TORCH_BOX(&compressops::cpu::merge_planes));
}
