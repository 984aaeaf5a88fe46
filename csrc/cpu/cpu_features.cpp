#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

namespace compressops::cpu {
namespace {

Features detect() {
  Features found;
#if defined(__x86_64__)
  // The builtins also ask whether the operating system saves the wide registers.
  __builtin_cpu_init();
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c") && __builtin_cpu_supports("pclmul");
  found.avx512 = found.avx2 && __builtin_cpu_supports("avx512f") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
  found.avx512_vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
  found.avx512_vbmi2 =
      found.avx512_vnni && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg") &&
      __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("vpclmulqdq");
#endif
  return found;
}

Features limited(const std::string& name) {
  Features found = detect();
  if (name == "native" || name == "avx512_vbmi2") return found;
  found.avx512_vbmi2 = false;
  if (name == "avx512_vnni") return found;
  found.avx512_vnni = false;
  if (name == "avx512") return found;
  found.avx512 = false;
  if (name == "avx2") return found;
  found.avx2 = false;
  if (name == "baseline") return found;
  throw std::invalid_argument(
      "instruction set must be baseline, avx2, avx512, avx512_vnni, avx512_vbmi2 or native, got '" +
      name + "'");
}

Features& current() {
  static Features instance = [] {
    const char* name = std::getenv("COMPRESSOPS_CPU_ISA");
    return limited(name != nullptr && *name != '\0' ? name : "native");
  }();
  return instance;
}

}  // namespace

const Features& features() { return current(); }

void limit_isa(const std::string& name) { current() = limited(name); }

}  // namespace compressops::cpu
