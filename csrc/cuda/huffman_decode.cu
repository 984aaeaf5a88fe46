#include <string>

#include "huffman_decode.cuh"
#include "stable_cuda.h"

namespace compressops {
namespace {

constexpr const char* kOp = "huffman_decode";

void check_vector(const Tensor& tensor, const char* argument, const char* dtype_name,
                  ScalarType dtype, const Tensor& stream) {
  COMPRESSOPS_CHECK(same_device(tensor, stream) && tensor.dim() == 1 && tensor.is_contiguous() &&
                        tensor.scalar_type() == dtype,
                    kOp, argument,
                    std::string("a contiguous ") + dtype_name + " vector on stream's CUDA device",
                    tensor);
}

[[noreturn]] void fail_status(const HuffmanStatus (&status)[kHuffmanStatusWords]) {
  if (status[0] != 0) {
    const auto error = static_cast<HuffmanError>(status[0]);
    fail_argument(kOp, "lengths", "a complete prefix code of at most 12 bits",
                  std::string(huffman_error_text(error)));
  }
  const auto error = static_cast<HuffmanError>(status[1] & 0xff);
  const std::string chunk = std::to_string(status[1] >> 8);
  const bool offsets = error == HuffmanError::kOffsets;
  fail_argument(kOp, offsets ? "offsets" : "stream",
                offsets ? "non-decreasing from 0 to the stream's size" : "a sound Huffman stream",
                "chunk " + chunk + ": " + huffman_error_text(error));
}

// Waits for the kernels once, because whether the stream was sound is known only then. So it cannot
// be captured in a CUDA graph.
void huffman_decode_out(const Tensor& stream, const Tensor& offsets, const Tensor& lengths,
                        int64_t chunk_size, Tensor out) {
  check_vector(stream, "stream", "uint8", ScalarType::Byte, stream);
  check_vector(offsets, "offsets", "int64", ScalarType::Long, stream);
  check_vector(lengths, "lengths", "uint8", ScalarType::Byte, stream);
  check_vector(out, "out", "uint8", ScalarType::Byte, stream);
  COMPRESSOPS_CHECK(lengths.numel() <= kHuffmanMaxSymbols, kOp, "lengths", "at most 256 long",
                    lengths.numel());
  COMPRESSOPS_CHECK(chunk_size > 0 && chunk_size <= kHuffmanMaxChunkSize, kOp, "chunk_size",
                    "from 1 to 32768", chunk_size);
  const int64_t num_symbols = out.numel();
  const int64_t chunks = ceil_div(num_symbols, chunk_size);
  COMPRESSOPS_CHECK(offsets.numel() == chunks + 1, kOp, "offsets",
                    std::to_string(chunks + 1) + " long (one a chunk, and the end)",
                    offsets.numel());

  const torch::stable::accelerator::DeviceGuard guard(stream.get_device_index());
  const Tensor table = torch::stable::new_empty(stream, {kHuffmanTableWords}, ScalarType::Int);
  const Tensor device_status =
      torch::stable::new_empty(stream, {kHuffmanStatusWords}, ScalarType::Long);
  const HuffmanArgs args = {static_cast<const uint8_t*>(stream.const_data_ptr()),
                            stream.numel(),
                            static_cast<const int64_t*>(offsets.const_data_ptr()),
                            chunks,
                            static_cast<const uint8_t*>(lengths.const_data_ptr()),
                            static_cast<int>(lengths.numel()),
                            num_symbols,
                            static_cast<int>(chunk_size),
                            static_cast<uint32_t*>(table.mutable_data_ptr()),
                            static_cast<HuffmanStatus*>(device_status.mutable_data_ptr()),
                            static_cast<uint8_t*>(out.mutable_data_ptr())};
  const cudaStream_t cuda_stream = current_stream(stream, kOp);
  check_cuda(launch_huffman_decode(args, multiprocessor_count(stream, kOp), cuda_stream), kOp);
  HuffmanStatus status[kHuffmanStatusWords];
  check_cuda(
      cudaMemcpyAsync(status, args.status, sizeof(status), cudaMemcpyDeviceToHost, cuda_stream),
      kOp);
  check_cuda(cudaStreamSynchronize(cuda_stream), kOp);
  if (status[0] != 0 || status[1] != kHuffmanNoBadChunk) fail_status(status);
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
