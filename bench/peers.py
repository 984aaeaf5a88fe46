"""What the benchmarks with other libraries share: their interface, bridges, the machine's peaks."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common import ROOT
from torch import Tensor

NATIVE = ROOT / "bench" / "native"
BUILD = ROOT / "build" / "bench"


class MissingError(RuntimeError):
    """A peer cannot take part; the message is the reason."""


@dataclass
class Peer:
    """``run`` is timed; ``result`` gives NCHW of the last run, to be checked."""

    run: Callable[[], Any]
    result: Callable[[], Tensor]
    note: str = ""


def compiled(source: str, *flags: str) -> ctypes.CDLL:
    """``bench/native/SOURCE`` as a library, compiled for this machine unless it was already."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise MissingError("no g++ to compile its bridge with")
    target = BUILD / f"{Path(source).stem}.so"
    if not target.exists() or target.stat().st_mtime < (NATIVE / source).stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = [*compiler, "-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        made = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, "-o", made, NATIVE / source, *flags], capture_output=True, text=True
        )
        if done.returncode:
            raise MissingError(f"{source} does not compile: {done.stderr.strip().splitlines()[0]}")
        made.rename(target)
    return ctypes.CDLL(str(target))


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{name} does not import: {error}") from error


@functools.cache
def fma_peak(threads: int) -> float:
    """GFLOP/s of float32 FMAs on registers; raises `MissingError` where it cannot be compiled."""
    library = compiled("fma_peak.cpp")
    library.fma_peak.restype = ctypes.c_double
    return library.fma_peak(threads)


@functools.cache
def vnni_peak(threads: int) -> float:
    """GOP/s of vpdpbusd on registers; raises as `fma_peak`."""
    library = compiled("vnni_peak.cpp")
    library.vnni_peak.restype = ctypes.c_double
    return library.vnni_peak(threads)


def read_bandwidth(threads: int, size: int) -> float:
    """GB/s at which ``size`` bytes are read that were read just before; raises as `fma_peak`."""
    library = compiled("read_bandwidth.cpp")
    library.read_bandwidth.restype = ctypes.c_double
    return library.read_bandwidth(threads, ctypes.c_long(size))
