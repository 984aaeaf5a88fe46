// What huffman_decode and huffman_decode_planes have in common on CUDA. Host code only.
#pragma once

#include <string>

#include "huffman_decode.cuh"
#include "stable_cuda.h"

namespace compressops {

inline void check_huffman_vector(const char* op, const Tensor& tensor, const char* argument,
                                 const char* dtype_name, ScalarType dtype, const Tensor& device) {
  COMPRESSOPS_CHECK(
      same_device(tensor, device) && tensor.dim() == 1 && tensor.is_contiguous() &&
          tensor.scalar_type() == dtype,
      op, argument,
      std::string("a contiguous ") + dtype_name + " vector on one CUDA device with the others",
      tensor);
}

inline void check_huffman_chunk_size(const char* op, int64_t chunk_size) {
  COMPRESSOPS_CHECK(chunk_size > 0 && chunk_size <= kHuffmanMaxChunkSize, op, "chunk_size",
                    "from 1 to 32768", chunk_size);
}

// The arguments of a stream's kernels, checked; `table` [kHuffmanTableWords] and `status`
// [kHuffmanStatusWords] are on the device.
inline HuffmanArgs huffman_args(const char* op, const Tensor& stream, const Tensor& offsets,
                                const Tensor& lengths, int64_t chunk_size, int64_t num_symbols,
                                uint32_t* table, HuffmanStatus* status) {
  check_huffman_vector(op, stream, "stream", "uint8", ScalarType::Byte, stream);
  check_huffman_vector(op, offsets, "offsets", "int64", ScalarType::Long, stream);
  check_huffman_vector(op, lengths, "lengths", "uint8", ScalarType::Byte, stream);
  COMPRESSOPS_CHECK(lengths.numel() <= kHuffmanMaxSymbols, op, "lengths", "at most 256 long",
                    lengths.numel());
  check_huffman_chunk_size(op, chunk_size);
  const int64_t chunks = ceil_div(num_symbols, chunk_size);
  COMPRESSOPS_CHECK(offsets.numel() == chunks + 1, op, "offsets",
                    std::to_string(chunks + 1) + " long (one a chunk, and the end)",
                    offsets.numel());
  return {static_cast<const uint8_t*>(stream.const_data_ptr()),
          stream.numel(),
          static_cast<const int64_t*>(offsets.const_data_ptr()),
          chunks,
          static_cast<const uint8_t*>(lengths.const_data_ptr()),
          static_cast<int>(lengths.numel()),
          num_symbols,
          static_cast<int>(chunk_size),
          table,
          status};
}

inline void check_huffman_status(const char* op,
                                 const HuffmanStatus (&status)[kHuffmanStatusWords]) {
  if (status[0] != 0) {
    fail_argument(op, "lengths", "a complete prefix code of at most 12 bits",
                  std::string(huffman_error_text(static_cast<HuffmanError>(status[0]))));
  }
  if (status[1] == kHuffmanNoBadChunk) return;
  const auto error = static_cast<HuffmanError>(status[1] & 0xff);
  const bool offsets = error == HuffmanError::kOffsets;
  fail_argument(op, offsets ? "offsets" : "stream",
                offsets ? "non-decreasing from 0 to the stream's size" : "a sound Huffman stream",
                "chunk " + std::to_string(status[1] >> 8) + ": " + huffman_error_text(error));
}

}  // namespace compressops
