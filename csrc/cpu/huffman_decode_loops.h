// The body of huffman_decode, written once. Included by one translation unit per instruction set,
// inside its anonymous namespace, after huffman_bits.h and the definitions of
//
//   count_ones(bits, n)                                  how many of n bits are 1
//   look_up(bits, n, d, symbols, out, store)             a group: d bits each, 1 to 8
//   merge_symbol_node(bits, n, zero, ones, out, store)   the first child is a symbol
//   merge_nodes(bits, n, zeros, ones, out, store)        none is; the last one never is
//
// The merges put one of the two (the next of two arrays) to out[i] for each of n bits; look_up puts
// to out[i] the symbol that the next d bits are the number of. They may read and write
// kHuffmanSlack bytes past the ends of arrays, but past that of out only with kWhole.

inline HuffmanFault decode_levels(const HuffmanTree& tree, HuffmanScratch& scratch, int64_t bytes,
                                  uint8_t* result, int64_t count, HuffmanStore last) {
  const uint8_t* data = scratch.chunk + kHuffmanHeaderBytes;
  // Downwards: how many symbols are below each node, and where its bits and,
  // level by level, these symbols are.
  int32_t counts[kHuffmanMaxSymbols], starts[kHuffmanMaxSymbols], places[kHuffmanMaxSymbols];
  counts[0] = (int32_t)count;
  starts[0] = places[0] = 0;
  for (int v = 0; v < tree.nodes; ++v) {
    const int group_bits = tree.group_bits[v];
    starts[v + 1] = starts[v] + counts[v] * (group_bits > 0 ? group_bits : 1);
    places[v + 1] = places[v] + counts[v];
    if (starts[v + 1] > 8 * bytes) return kHuffmanOverrun;
    if (group_bits > 0) continue;
    const int zero_child = tree.child[v][0], one_child = tree.child[v][1];
    counts[one_child] = (int32_t)count_ones(Bits(data, starts[v]), counts[v]);
    if (zero_child >= 0) counts[zero_child] = counts[v] - counts[one_child];
  }
  const HuffmanFault end = huffman_check_end(data, bytes, starts[tree.nodes]);
  if (end != kHuffmanSound) return end;

  // Upwards, each level from the one below. Within a level from left to right, so that what a merge
  // writes past its end is overwritten by the next.
  for (int level = tree.levels - 1; level >= 0; --level) {
    const int first = tree.first_node[level], next = tree.first_node[level + 1];
    const uint8_t* below = scratch.levels[(level + 1) % 2] - places[next];
    uint8_t* here = level == 0 ? result : scratch.levels[level % 2] - places[first];
    const HuffmanStore store = level == 0 ? last : HuffmanStore::kWhole;
    for (int v = first; v < next; ++v) {
      const Bits bits(data, starts[v]);
      uint8_t* out = here + places[v];
      const int zero_child = tree.child[v][0];
      const uint8_t* ones = below + places[tree.child[v][1]];
      if (tree.group_bits[v] > 0) {
        look_up(bits, counts[v], tree.group_bits[v], tree.symbols + tree.group_first[v], out,
                store);
      } else if (zero_child < 0) {
        merge_symbol_node(bits, counts[v], -1 - zero_child, ones, out, store);
      } else {
        merge_nodes(bits, counts[v], below + places[zero_child], ones, out, store);
      }
    }
  }
  return kHuffmanSound;
}
