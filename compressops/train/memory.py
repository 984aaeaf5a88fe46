"""Memory of the C library: freed blocks are kept, because training asks for them again at once."""

from __future__ import annotations

import ctypes
import os

# Opt out with COMPRESSOPS_KEEP_MEMORY=0. Who set one of the others has made up his mind already.
VARIABLE = "COMPRESSOPS_KEEP_MEMORY"
_OTHERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for training on a CPU.

    glibc maps every block above 32 MB anew and gives it back when it is freed, so each step of a
    training touches all of its activations' pages for the first time: for CifarNet at a batch of
    500 half a million page faults a step, a quarter to a third of its time on two cores. After
    this call freed blocks stay in the heap. That changes no result. It costs memory: the process
    keeps its largest size to its end, and that grows by the heap's gaps (here from 1.4 to 2.1 GB).

    For programs, not libraries: the command line, the demo and the scripts of this project call it
    before they train. ``COMPRESSOPS_KEEP_MEMORY=0`` in the environment, or any setting of glibc's
    own for it (``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES`` …), is respected.

    Returns:
        whether it was done; ``False`` too where the C library is not glibc.
    """
    if os.environ.get(VARIABLE) == "0" or any(name in os.environ for name in _OTHERS):
        return False
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Before glibc 2.35 no threshold above 32 MB is allowed; but no mapping at all is.
    largest = 2**31 - 1
    mapped = mallopt(_M_MMAP_THRESHOLD, largest) or mallopt(_M_MMAP_MAX, 0)
    return bool(mapped and mallopt(_M_TRIM_THRESHOLD, -1))


def _is_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False
