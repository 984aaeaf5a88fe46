#include "huffman_decode_planes.cuh"
#include "huffman_op.h"
#include "merge_planes_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "huffman_decode_planes";

template <class Code>
void decode(const Tensor& out, const std::vector<Tensor>& planes,
            const std::vector<Tensor>& offsets, const std::vector<Tensor>& lengths,
            int64_t chunk_size, bool turned) {
  MergedCodes<Code> codes = merged_codes<Code>(out);
  constexpr int kPlanes = MergedCodes<Code>::kPlanes;
  const Tensor tables =
      torch::stable::new_empty(out, {kPlanes, kHuffmanTableWords}, ScalarType::Int);
  const Tensor statuses =
      torch::stable::new_empty(out, {kPlanes, kHuffmanStatusWords}, ScalarType::Long);
  auto* table = static_cast<uint32_t*>(tables.mutable_data_ptr());
  auto* status = static_cast<HuffmanStatus*>(statuses.mutable_data_ptr());
  HuffmanArgs coded[kPlanes] = {};
  unsigned which = 0;
  for (int p = 0; p < kPlanes; ++p) {
    const auto at = static_cast<size_t>(p);
    check_huffman_vector(kOp, offsets[at], "offsets", "int64", ScalarType::Long, out);
    check_huffman_vector(kOp, lengths[at], "lengths", "uint8", ScalarType::Byte, out);
    if (lengths[at].numel() == 0) {
      codes.planes[p] = raw_plane(kOp, planes[at], out);
      codes.raw |= 1u << p;
      continue;
    }
    check_huffman_vector(kOp, planes[at], "planes", "uint8", ScalarType::Byte, out);
    coded[p] = huffman_args(kOp, planes[at], offsets[at], lengths[at], chunk_size, codes.count,
                            table + kHuffmanTableWords * p, status + kHuffmanStatusWords * p);
    which |= 1u << p;
  }
  const cudaStream_t stream = current_stream(out, kOp);
  check_cuda(launch_huffman_decode_planes(codes, coded, which, turned,
                                          multiprocessor_count(out, kOp), stream),
             kOp);
  if (which == 0) return;
  HuffmanStatus found[kPlanes][kHuffmanStatusWords];
  check_cuda(cudaMemcpyAsync(found, status, sizeof(found), cudaMemcpyDeviceToHost, stream), kOp);
  check_cuda(cudaStreamSynchronize(stream), kOp);
  for (int p = 0; p < kPlanes; ++p)
    if ((which >> p & 1) != 0) check_huffman_status(kOp, found[p]);
}

// Waits for the kernels once, as huffman_decode does, where a plane is coded.
void huffman_decode_planes(Tensor out, std::vector<Tensor> planes, std::vector<Tensor> offsets,
                           std::vector<Tensor> lengths, int64_t chunk_size, bool turned) {
  const int64_t bytes = merged_bytes(kOp, out);
  check_each_plane(kOp, "planes", planes, bytes);
  check_each_plane(kOp, "offsets", offsets, bytes);
  check_each_plane(kOp, "lengths", lengths, bytes);
  check_huffman_chunk_size(kOp, chunk_size);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  if (bytes == 2) {
    decode<uint16_t>(out, planes, offsets, lengths, chunk_size, turned);
  } else {
    decode<uint32_t>(out, planes, offsets, lengths, chunk_size, turned);
  }
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("huffman_decode_planes", TORCH_BOX(&compressops::huffman_decode_planes));
}
