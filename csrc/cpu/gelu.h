// GELU in place, for the epilogues of other kernels. This header is included by translation units
// that are compiled for different instruction sets, so it defines no function and includes nothing
// that would: a linker may keep the wrong copy of an inline function.
#pragma once

#include <stdint.h>

namespace compressops::cpu {

// values[i] = values[i] · Φ(values[i]), the exact GELU (not its tanh approximation): as close to it
// as torch's, some 1e-7 times the value. NaN stays NaN; -∞ becomes NaN, as in torch.
using Gelu = void (*)(float* values, int64_t count);

void gelu_baseline(float* values, int64_t count);
void gelu_avx2(float* values, int64_t count);
void gelu_avx512(float* values, int64_t count);

// The one of them that suits the processor.
Gelu gelu();

}  // namespace compressops::cpu
