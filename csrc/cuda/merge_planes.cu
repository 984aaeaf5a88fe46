#include "merge_planes_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "merge_planes";

template <class Code>
void merge(const Tensor& out, const std::vector<Tensor>& planes, bool turned) {
  MergedCodes<Code> codes = merged_codes<Code>(out);
  codes.turned = turned;
  for (int p = 0; p < codes.kPlanes; ++p) {
    codes.planes[p] = raw_plane(kOp, planes[static_cast<size_t>(p)], out);
    codes.raw |= 1u << p;
  }
  check_cuda(launch_merge_planes(codes, current_stream(out, kOp)), kOp);
}

void merge_planes_to(Tensor out, std::vector<Tensor> planes, bool turned) {
  const int64_t bytes = merged_bytes(kOp, out);
  check_each_plane(kOp, "planes", planes, bytes);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  if (bytes == 2) {
    merge<uint16_t>(out, planes, turned);
  } else {
    merge<uint32_t>(out, planes, turned);
  }
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("merge_planes", TORCH_BOX(&compressops::merge_planes_to));
}
