// What the operators huffman_decode and huffman_encode check alike.
#pragma once

#include <string>

#include "../check.h"
#include "huffman_tree.h"

namespace compressops::cpu {

inline bool is_vector(const Tensor& tensor, ScalarType dtype) {
  return tensor.is_cpu() && tensor.dim() == 1 && tensor.scalar_type() == dtype &&
         tensor.is_contiguous();
}

inline void check_chunk_size(const char* op, int64_t chunk_size) {
  COMPRESSOPS_CHECK(chunk_size > 0 && chunk_size <= kHuffmanMaxChunkSize, op, "chunk_size",
                    "from 1 to 32768", chunk_size);
}

// The tree of a code that `num_symbols` symbols are written in.
inline HuffmanTree tree_of(const char* op, const Tensor& lengths, int64_t num_symbols) {
  COMPRESSOPS_CHECK(is_vector(lengths, ScalarType::Byte) && lengths.numel() <= kHuffmanMaxSymbols,
                    op, "lengths", "a contiguous CPU uint8 tensor [S], S <= 256", lengths);
  HuffmanTree tree;
  int kraft = 0;
  const auto* values = static_cast<const uint8_t*>(lengths.const_data_ptr());
  const char* wrong = huffman_build_tree(values, static_cast<int>(lengths.numel()), tree, kraft);
  const bool none = tree.nodes == 0 && tree.lone_symbol < 0 && num_symbols > 0;
  if (wrong == nullptr && none) wrong = "no symbol has a code";
  COMPRESSOPS_CHECK(wrong == nullptr, op, "lengths",
                    "a complete prefix code of at most 12 bits (Kraft sum of 4096/4096)",
                    std::string(wrong) + ": " + std::to_string(kraft) + "/4096");
  return tree;
}

}  // namespace compressops::cpu
