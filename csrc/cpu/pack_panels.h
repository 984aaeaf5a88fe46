// Codes of weights to the panels that the products of integers read. This header is included by
// translation units that are compiled for different instruction sets, so it defines no function and
// includes nothing that would: a linker may keep the wrong copy of an inline function.
//
// A word holds 32 / bits inputs of one output, and a panel is a matrix of words [inputs][outputs]:
// the transpose of the rows. A kilobyte of words is one transpose in registers, 6 instructions for
// 64 bytes, so that memory is the limit.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

// Some rows of a panel, and how they are written.
struct PanelRows {
  const int8_t* codes;  // [rows][inputs], `stride` apart
  int64_t stride;
  int64_t rows;    // 1 to `together`
  int64_t inputs;  // 0 or more
  uint8_t zero;    // added to each code, modulo 2^bits
  uint32_t* out;   // [words][width], the first of `together` neighbours in each line
  int64_t width;
  int32_t* sums;  // [rows], added to, or null
};

// Each writes all words of `together` rows, with zeros beyond rows and inputs.
struct PackPanelsKernels {
  int64_t together;
  void (*bits8)(const PanelRows& rows);
  void (*bits4)(const PanelRows& rows);
  void (*bits2)(const PanelRows& rows);
};
const PackPanelsKernels& pack_panels_baseline();
const PackPanelsKernels& pack_panels_avx2();
const PackPanelsKernels& pack_panels_avx512();

}  // namespace compressops::cpu
