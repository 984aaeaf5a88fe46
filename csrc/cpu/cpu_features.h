// What the processor that runs this can do. The ISA variants of the kernels are chosen by it.
#pragma once

#include <string>

namespace compressops::cpu {

struct Features {
  bool avx2 = false;          // AVX2, FMA, F16C, PCLMUL
  bool avx512 = false;        // and AVX-512 F, BW, DQ, VL
  bool avx512_vnni = false;   // and VNNI
  bool avx512_vbmi2 = false;  // and what came with Ice Lake and Zen 4: VBMI, VBMI2, BITALG,
                              // VPOPCNTDQ, VPCLMULQDQ
};

// Read by CPUID once, lowered by limit_isa or by COMPRESSOPS_CPU_ISA.
const Features& features();

// Use no instruction set above this one: "baseline", "avx2", "avx512", "avx512_vnni",
// "avx512_vbmi2", or "native" for all that there are. For tests and benchmarks; not while kernels
// run.
void limit_isa(const std::string& name);

}  // namespace compressops::cpu
