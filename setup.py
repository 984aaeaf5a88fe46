"""Builds the two libraries with ninja: compressops._C (CPU kernels) and compressops._cuda.

    COMPRESSOPS_CPP=auto|0|1     CPU kernels; auto builds them where a C++ compiler is
    COMPRESSOPS_CUDA=auto|0|1    CUDA kernels; auto builds them where nvcc is
    TORCH_CUDA_ARCH_LIST         such as "8.0;9.0a" (the default)
    MAX_JOBS                     compilations side by side
    CXX, NVCC                    the compilers

With neither, the package still works on its eager and Triton backends.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# LibTorch's stable ABI of torch 2.11: one build serves that and every later torch, and the CUDA
# library compiles beside a torch without CUDA.
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas {ABI}"
NVCC_FLAGS = (
    f"-std=c++20 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Werror all-warnings "
    f"-DUSE_CUDA {ABI}"
)


def find_compiler(variable: str, *names: str) -> str | None:
    named = os.environ.get(variable)
    if named:
        return named
    return next((path for name in names if (path := shutil.which(name))), None)


def wants(switch: str, compiler: str | None, needed: str) -> bool:
    value = os.environ.get(switch, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{switch} must be auto, 0 or 1, got {value!r}")
    if value != "0" and compiler is None:
        if value == "1":
            sys.exit(f"{switch}=1, but there is no {needed}")
        print(f"compressops: no {needed}; building without its kernels", file=sys.stderr)
    return value != "0" and compiler is not None


def gencode_flags() -> str:
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number[:-1].isdigit():
            sys.exit(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0a', got {arch!r} in it")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if number == "90a":
            flags.append("-DCOMPRESSOPS_SM90A")  # the host's code then chooses Hopper's kernels
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


class NinjaBuild(build_ext):
    """Writes build.ninja for each extension and runs it; a second build redoes what changed."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11
        from torch.utils.cpp_extension import include_paths, library_paths

        includes = [*include_paths("cpu"), pybind11.get_include(), sysconfig.get_path("include")]
        include_flags = " ".join(f"-isystem {path}" for path in includes)
        libraries = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in library_paths())
        folder = Path(self.build_temp).resolve() / ext.name
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("_cuda"):
            compiler, flags = find_compiler("NVCC", "nvcc"), f"{NVCC_FLAGS} {gencode_flags()}"
            link = "-shared -cudart static -Xlinker --no-undefined"
            libraries = libraries.replace("-Wl,", "-Xlinker ").replace("rpath,", "rpath -Xlinker ")
        else:
            compiler, flags = find_compiler("CXX", "c++", "g++", "clang++"), CXX_FLAGS
            link = "-shared"
        compile_command = f"{compiler} -MD -MF $out.d {flags} {include_flags} -c $in -o $out"
        link_command = f"{compiler} {link} $in {libraries} -ltorch -ltorch_cpu -o $out"
        lines = [
            "rule compile\n  description = $in\n  depfile = $out.d\n  deps = gcc",
            f"  command = {compile_command}",
            f"rule link\n  description = $out\n  command = {link_command}",
        ]
        objects = []
        for source in ext.sources:
            objects.append(str(folder / Path(source).with_suffix(".o").name))
            lines.append(f"build {objects[-1]}: compile {ROOT / source}")
        lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *jobs]
        if subprocess.run(command).returncode:
            sys.exit(f"compressops: building {ext.name} failed (see above)")


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


extensions = []
if wants("COMPRESSOPS_CPP", find_compiler("CXX", "c++", "g++", "clang++"), "C++ compiler"):
    extensions.append(Extension("compressops._C", sources("csrc/module.cpp", "csrc/cpu/*.cpp")))
if wants("COMPRESSOPS_CUDA", find_compiler("NVCC", "nvcc"), "nvcc"):
    extensions.append(Extension("compressops._cuda", sources("csrc/cuda/*.cu")))
extensions = [e for e in extensions if e.sources]

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
