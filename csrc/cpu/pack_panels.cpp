// pack_panels on a CPU: rows of codes to panels, transposed in registers.
#include "pack_panels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../check.h"
#include "cpu_features.h"
#include "workers.h"

namespace compressops::cpu {
namespace {

constexpr const char* kOp = "pack_panels";
// Codes to a task: some microseconds of work.
constexpr int64_t kGrain = 1 << 16;

const PackPanelsKernels& kernels() {
#if defined(__x86_64__)
  if (features().avx512) return pack_panels_avx512();
  if (features().avx2) return pack_panels_avx2();
#endif
  return pack_panels_baseline();
}

// The codes [rows][inputs][taps] of one tap, [rows][inputs].
void gather_tap(const int8_t* codes, int64_t rows, int64_t inputs, int64_t taps, int8_t* out) {
  for (int64_t i = 0; i < rows * inputs; ++i) out[i] = codes[i * taps];
}

void pack_panels(Tensor out, Tensor codes, int64_t bits, int64_t zero, std::optional<Tensor> sums) {
  COMPRESSOPS_CHECK(codes.is_cpu() && codes.scalar_type() == ScalarType::Char && codes.dim() == 3 &&
                        codes.is_contiguous(),
                    kOp, "codes", "a contiguous CPU int8 tensor [N, K, taps]", codes);
  COMPRESSOPS_CHECK(bits == 2 || bits == 4 || bits == 8, kOp, "bits", "2, 4 or 8", bits);
  COMPRESSOPS_CHECK(zero >= 0 && zero < (bits == 8 ? 1 : 1 << bits), kOp, "zero",
                    "from 0 to 2^bits - 1, 0 of 8 bits", zero);
  const int64_t N = codes.size(0), K = codes.size(1), taps = codes.size(2);
  const int64_t inputs = 32 / bits, words = (K + inputs - 1) / inputs, columns = taps * words;
  const int64_t outputs = (N + 15) / 16 * 16, panel = bits == 8 ? 16 : 32;
  COMPRESSOPS_CHECK(
      out.is_cpu() &&
          (out.scalar_type() == ScalarType::Byte || out.scalar_type() == ScalarType::Char) &&
          out.is_contiguous() && out.numel() == 4 * outputs * columns,
      kOp, "out", "contiguous, of " + std::to_string(4 * outputs * columns) + " bytes on the CPU",
      out);
  int32_t* totals = nullptr;
  if (sums.has_value()) {
    COMPRESSOPS_CHECK(bits == 8 && sums->is_cpu() && sums->scalar_type() == ScalarType::Int &&
                          sums->dim() == 1 && sums->size(0) == N && sums->is_contiguous(),
                      kOp, "sums", "a contiguous CPU int32 [" + std::to_string(N) + "] of 8 bits",
                      *sums);
    totals = static_cast<int32_t*>(sums->mutable_data_ptr());
    std::fill(totals, totals + N, 0);
  }
  const int8_t* from = static_cast<const int8_t*>(codes.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const PackPanelsKernels& isa = kernels();
  const auto pack = bits == 8 ? isa.bits8 : bits == 4 ? isa.bits4 : isa.bits2;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, panel * K * taps));
  const int64_t panels = (outputs + panel - 1) / panel;
  torch::stable::parallel_for(0, columns ? panels : 0, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    int8_t* gathered = taps == 1 ? nullptr : memory.get<int8_t>(isa.together * K);
    for (int64_t row = begin * panel; row < std::min(end * panel, outputs); row += isa.together) {
      const int64_t first = row / panel * panel, width = std::min(panel, outputs - first);
      const int64_t rows = std::clamp<int64_t>(N - row, 0, isa.together);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int8_t* at = from + std::min(row, N) * K * taps + tap;
        if (taps > 1) gather_tap(at, rows, K, taps, gathered), at = gathered;
        uint32_t* lines =
            reinterpret_cast<uint32_t*>(to) + first * columns + tap * words * width + row % panel;
        pack({at, K, rows, K, static_cast<uint8_t>(zero), lines, width,
              totals ? totals + row : nullptr});
      }
    }
  });
}

}  // namespace
}  // namespace compressops::cpu

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CPU, m) {
  m.impl("pack_panels", TORCH_BOX(&compressops::cpu::pack_panels));
}
