#include <string>

#include "huffman_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "huffman_decode";

// Waits for the kernels once, because whether the stream was sound is known only then. So it cannot
// be captured in a CUDA graph.
void huffman_decode_out(const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
                        int64_t chunk_size, Tensor out) {
  check_huffman_vector(kOp, out, "out", "uint8", ScalarType::Byte, stream);
  const torch::stable::accelerator::DeviceGuard guard(stream.get_device_index());
  const Tensor table = torch::stable::new_empty(stream, {kHuffmanTableWords}, ScalarType::Int);
  const Tensor device_status =
      torch::stable::new_empty(stream, {kHuffmanStatusWords}, ScalarType::Long);
  const HuffmanArgs args =
      huffman_args(kOp, stream, offsets, lengths, chunk_size, out.numel(),
                   static_cast<uint32_t*>(table.mutable_data_ptr()),
                   static_cast<HuffmanStatus*>(device_status.mutable_data_ptr()));
  const HuffmanBytes sink = {static_cast<uint8_t*>(out.mutable_data_ptr())};
  const cudaStream_t cuda_stream = current_stream(stream, kOp);
  check_cuda(launch_huffman_decode(args, sink, multiprocessor_count(stream, kOp), cuda_stream),
             kOp);
  HuffmanStatus status[kHuffmanStatusWords];
  check_cuda(
      cudaMemcpyAsync(status, args.status, sizeof(status), cudaMemcpyDeviceToHost, cuda_stream),
      kOp);
  check_cuda(cudaStreamSynchronize(cuda_stream), kOp);
  check_huffman_status(kOp, status);
}

Tensor huffman_decode(const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
                      int64_t num_symbols, int64_t chunk_size) {
  // A symbol takes at least one bit: a lying count cannot ask for more memory than this.
  COMPRESSOPS_CHECK(
      num_symbols >= 0 && num_symbols / 8 + (num_symbols % 8 != 0) <= stream.numel(), kOp,
      "num_symbols",
      "between 0 and 8 times the " + std::to_string(stream.numel()) + " bytes of the stream",
      num_symbols);
  Tensor out = torch::stable::new_empty(stream, {num_symbols}, ScalarType::Byte);
  huffman_decode_out(stream, offsets, lengths, chunk_size, out);
  return out;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("huffman_decode", TORCH_BOX(&compressops::huffman_decode));
  m.impl("huffman_decode_out", TORCH_BOX(&compressops::huffman_decode_out));
}
