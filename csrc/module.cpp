// The Python module compressops._C. Importing it loads this library, whose static initialisers
// register the CPU kernels with the dispatcher.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/cpu_features.h"

#define COMPRESSOPS_STRING_(x) #x
#define COMPRESSOPS_STRING(x) COMPRESSOPS_STRING_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of compressops; importing this registers them.";
  m.def(
      "cpu_features",
      [] {
        const auto& f = compressops::cpu::features();
        pybind11::dict out;
        out["avx2"] = f.avx2;
        out["avx512"] = f.avx512;
        out["avx512_vnni"] = f.avx512_vnni;
        out["avx512_vbmi2"] = f.avx512_vbmi2;
        return out;
      },
      "Instruction sets that the kernels may use on this processor: dict of name to bool.");
  m.def("limit_isa", &compressops::cpu::limit_isa, pybind11::arg("name"),
        "Use no instruction set above this one: baseline, avx2, avx512, avx512_vnni, avx512_vbmi2, "
        "native.");
  m.def(
      "build_info",
      [] {
        pybind11::dict out;
        out["compiler"] = __VERSION__;
        out["torch"] = COMPRESSOPS_STRING(TORCH_VERSION_MAJOR) "." COMPRESSOPS_STRING(
            TORCH_VERSION_MINOR) "." COMPRESSOPS_STRING(TORCH_VERSION_PATCH);
        out["torch_abi_target"] = COMPRESSOPS_STRING(TORCH_TARGET_VERSION);
        return out;
      },
      "Compiler and torch headers that this library was built with.");
}
