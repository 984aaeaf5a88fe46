"""Builds the CUDA kernels for a CPU and calls them; see ``cuda_on_cpu.h`` for what that checks.

Libraries are kept in ``build/cuda_on_cpu`` under a digest of all that goes into them. ``Plant``
builds a kernel with a mistake in it, to show that the mistake is found.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_on_cpu"
# As CXX may be given to the build : a compiler, or a wrapper and its compiler.
_NAMED = map(shlex.split, (os.environ.get("CXX", "g++"), "clang++"))
COMPILER = next((words for words in _NAMED if words and shutil.which(words[0])), None)
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Otherwise the loader would merge the shim's variables of all the libraries of a process.
UNMERGED = "-fno-gnu-unique"
MESSAGE_BYTES = 1024
# Threads and blocks run forwards, backwards, and shuffled anew between any two barriers.
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1), "random2": (2, 2)}


class KernelError(AssertionError):
    """A kernel did what it would be wrong to do on a GPU; the message says where."""


@dataclass(frozen=True)
class Plant:
    """A mistake: in the header ``file``, the one occurrence of ``old`` becomes ``new``."""

    file: str
    old: str
    new: str


def build(op: str, plant: Plant | None = None, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The runner ``{op}.cpp`` as a library, compiled unless the same has been before."""
    planted = None
    if plant is not None:
        text = (KERNELS / plant.file).read_text()
        assert text.count(plant.old) == 1, f"{plant.file}: {text.count(plant.old)} × {plant.old!r}"
        planted = text.replace(plant.old, plant.new)
    flags = [*FLAGS, *WARNINGS, *(f"-D{name}" for name in defines)]
    if "clang" not in Path(COMPILER[-1]).name:
        flags.append(UNMERGED)
    digest = hashlib.sha256(" ".join([*COMPILER, *flags, planted or ""]).encode())
    for source in sorted([*KERNELS.glob("*.cuh"), *HERE.glob("*.h"), HERE / f"{op}.cpp"]):
        digest.update(source.name.encode() + source.read_bytes())
    target = CACHE / f"{op}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            includes = [f"-I{HERE}", f"-I{KERNELS}"]
            if plant is not None:
                # All of them : a quoted include looks beside the including file first.
                for header in KERNELS.glob("*.cuh"):
                    shutil.copy(header, folder)
                (Path(folder) / plant.file).write_text(planted)
                includes = [f"-I{HERE}", f"-I{folder}"]
            output = Path(folder) / target.name
            command = [*COMPILER, *flags, *includes, str(HERE / f"{op}.cpp"), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            output.replace(target)
    return ctypes.CDLL(str(target))


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _call(function, *args, order: str) -> None:
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    mode, seed = ORDERS[order]
    if function(*args, ctypes.c_int(mode), ctypes.c_uint(seed), message) != 0:
        raise KernelError(message.value.decode())


DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
c_int64 = ctypes.c_int64
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
INT8_LINEAR_KERNELS = {
    **{"auto": -1, "rows1": 0, "rows4": 1, "rows16": 2, "tile64": 3, "tile128": 4},
    **{"wgmma128": 5, "wgmma256": 6},
}


def int8_linear(
    library: ctypes.CDLL,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
    *,
    kernel: str = "auto",
    max_blocks: int = 2**31 - 1,
    capability: int = 80,
    order: str = "forward",
) -> torch.Tensor:
    """The op on ``x`` ``[M, K]`` (dense rows), with its second kernel forced if named."""
    (M, K), N = x.shape, weight.shape[0]
    sums = weight.sum(1, dtype=torch.int32)
    y = torch.full((M, N), 77.0, dtype=x.dtype)
    _call(
        library.run_int8_linear,
        ctypes.c_int(DTYPES[x.dtype]),
        *(ctypes.c_int64(size) for size in (M, N, K, x.stride(0))),
        *map(_pointer, (x, weight, weight_scales, sums, bias, x_scale, x_zero, y)),
        ctypes.c_int(ACTIVATIONS[activation]),
        ctypes.c_int(2 if x_scale is not None else not symmetric),
        ctypes.c_int(INT8_LINEAR_KERNELS[kernel]),
        ctypes.c_int64(max_blocks),
        ctypes.c_int(capability),
        order=order,
    )
    return y


def round_rows(
    library: ctypes.CDLL,
    x: torch.Tensor,
    symmetric: bool = True,
    *,
    max_blocks: int = 2**31 - 1,
    order: str = "forward",
) -> torch.Tensor:
    """The op on ``x`` of up to four dimensions, whose last is dense."""
    y = torch.full(x.shape, 77.0, dtype=x.dtype)
    missing = 4 - x.dim()
    sizes = (*(1,) * missing, *x.shape)
    strides = (*(0,) * missing, *x.stride()[:-1])
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    _call(
        library.run_round_rows,
        ctypes.c_int(DTYPES[x.dtype]),
        (c_int64 * 4)(*sizes),
        (c_int64 * 3)(*strides),
        *(_pointer(x), c_int64(span if x.numel() else 0), _pointer(y)),
        ctypes.c_int(symmetric),
        c_int64(max_blocks),
        order=order,
    )
    return y


INT8_CONV2D_KERNELS = {"auto": -1, "tile64": 0, "tile128": 1}
INT8_CONV2D_FORMS = {(1, 16): 0, (16, 4): 1, (16, 1): 2}  # panel and depth


def int8_conv2d_sizes(
    x: torch.Tensor,
    packed: torch.Tensor,
    K: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> ctypes.Array:
    """The shape of the op on a weight that is packed as GPUs have it."""
    (N, C, H, W), first = x.shape, 1 if packed.dim() == 5 else 2
    R, S = packed.shape[first : first + 2]
    OH, OW = (
        (size + 2 * padding[i] - dilation[i] * (taps - 1) - 1) // stride[i] + 1
        for i, (size, taps) in enumerate(((H, R), (W, S)))
    )
    form = INT8_CONV2D_FORMS[tuple(packed.shape[-2:])]
    sizes = (N, groups, C // groups, K // groups, H, W, OH, OW, R, S)
    sizes = (*sizes, *stride, *padding, *dilation, form)
    return (c_int64 * len(sizes))(*sizes)


def int8_conv2d(
    library: ctypes.CDLL,
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_sums: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
    *,
    pack: bool = False,
    y_last: bool = False,
    kernel: str = "auto",
    max_blocks: int = 2**31 - 1,
    order: str = "forward",
) -> torch.Tensor:
    """The op on images without gaps, with its tile forced if named.

    ``pack``: give it ``weight`` for its own kernel to pack, and not ``packed``.
    """
    K = len(weight_scales)
    sizes = int8_conv2d_sizes(x, packed, K, stride, padding, dilation, groups)
    y = torch.full((x.shape[0], K, sizes[6], sizes[7]), 77.0, dtype=x.dtype)
    if y_last:
        y = y.contiguous(memory_format=torch.channels_last)
    given = weight if pack else packed
    _call(
        library.run_int8_conv2d,
        ctypes.c_int(DTYPES[x.dtype]),
        sizes,
        _pointer(x),
        c_int64(x.stride(0)),
        ctypes.c_int(x.stride(1) == 1 and x.shape[1] > 1),
        ctypes.c_int(y_last),
        *(_pointer(given), c_int64(given.numel()), ctypes.c_int(not pack)),
        *map(_pointer, (weight_scales, weight_sums, bias, x_scale, x_zero, y)),
        ctypes.c_int(ACTIVATIONS[activation]),
        ctypes.c_int(2 if x_scale is not None else not symmetric),
        ctypes.c_int(INT8_CONV2D_KERNELS[kernel]),
        c_int64(max_blocks),
        order=order,
    )
    return y


PACKED_LINEAR_KERNELS = {
    **{"auto": -1, "rows8": 0, "rows8short": 1, "rows16": 2, "wide": 3, "wgmma": 4}
}


def packed_linear(
    library: ctypes.CDLL,
    kind,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int | None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    quantize_x: bool = True,
    *,
    kernel: str = "auto",
    splits: int = 0,
    capability: int = 90,
    order: str = "forward",
) -> torch.Tensor:
    """The op of ``kind`` (its `Codes`) on ``x`` ``[M, K]`` (dense rows) and a weight as GPUs have
    it: `pack_fragments`, scales and zeros ``[groups, N]``. ``splits``: 0, or so many of K."""
    (M, K), N = x.shape, scales.shape[1]
    y = torch.full((M, N), 77.0, dtype=x.dtype)
    sizes = (M, N, K, x.stride(0), min(group_size or K, K))
    _call(
        library.run_packed_linear,
        *map(ctypes.c_int, (kind.bits, quantize_x, DTYPES[x.dtype])),
        (c_int64 * len(sizes))(*sizes),
        *map(_pointer, (x, weight, scales, zeros, bias, y)),
        ctypes.c_int(ACTIVATIONS[activation]),
        ctypes.c_int(PACKED_LINEAR_KERNELS[kernel]),
        c_int64(splits),
        ctypes.c_int(capability),
        order=order,
    )
    return y


WINOGRAD_KERNELS = {"auto": -1, "fused": 0, "small": 1, "large": 2, "shallow": 3}


def _winograd_sizes(x, weight, padding: tuple[int, int], groups: int, tile: int) -> ctypes.Array:
    (N, _, H, W), (K, C, rh, r) = x.shape, weight.shape
    sizes = (N, groups, C, K // groups, H, W, *padding, r, tile, rh == 1)
    return (c_int64 * len(sizes))(*sizes)


def winograd_conv2d(
    library: ctypes.CDLL,
    x: torch.Tensor,
    weight: torch.Tensor,
    transformed: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    activation: str = "none",
    tile: int = 4,
    *,
    kernel: str = "auto",
    scratch_bytes: int = 2**24,
    order: str = "forward",
) -> torch.Tensor:
    """The op on ``transformed`` [P, K, C / groups] of x's dtype, with its kernels as named.

    ``scratch_bytes`` is what V and M of a chunk may take.
    """
    height, width = (size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True))
    size = (x.shape[0], weight.shape[0], height - weight.shape[2] + 1, width - weight.shape[3] + 1)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = torch.full(size, 77.0, dtype=x.dtype)
    if last:
        y = y.contiguous(memory_format=torch.channels_last)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    _call(
        library.run_winograd_conv2d,
        ctypes.c_int(DTYPES[x.dtype]),
        _winograd_sizes(x, weight, padding, groups, tile),
        (c_int64 * 4)(*x.stride()),
        _pointer(x),
        c_int64(span if x.numel() else 0),
        *map(_pointer, (transformed, bias, y)),
        ctypes.c_int(last),
        ctypes.c_int(ACTIVATIONS[activation]),
        ctypes.c_int(WINOGRAD_KERNELS[kernel]),
        c_int64(scratch_bytes),
        order=order,
    )
    return y


def winograd_plan(
    library: ctypes.CDLL,
    x: torch.Tensor,
    weight: torch.Tensor,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    tile: int = 4,
    *,
    half: bool = True,
    last: bool = True,
    shared_kib: int = 227,
) -> tuple[str, int, int, int]:
    """Kernel, tiles and groups of a chunk and bytes of scratch on an H200 (132 SMs, 50 MiB L2)."""
    plan = (c_int64 * 4)()
    sizes = _winograd_sizes(x, weight, padding, groups, tile)
    library.plan_winograd_conv2d_of(
        *(ctypes.c_int(half), sizes, ctypes.c_int(last), c_int64(132)),
        *(c_int64(shared_kib * 1024), c_int64(50 * 2**20), plan),
    )
    names = {value: name for name, value in WINOGRAD_KERNELS.items()}
    return names[plan[0]], *plan[1:]


def huffman_decode(
    library: ctypes.CDLL,
    stream: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    num_symbols: int,
    chunk_size: int,
    *,
    output_shift: int = 0,
    order: str = "forward",
) -> tuple[np.ndarray, int, int | None, int]:
    """Output, table error, first bad chunk (None: all are sound) and that chunk's error."""
    output = np.full(num_symbols + output_shift, 0x5A, np.uint8)[output_shift:]
    status = np.zeros(2, np.uint64)
    _call(
        library.run_huffman_decode,
        ctypes.c_void_p(stream.ctypes.data),
        ctypes.c_int64(len(stream)),
        ctypes.c_void_p(offsets.ctypes.data),
        ctypes.c_int64(len(offsets) - 1),
        ctypes.c_void_p(lengths.ctypes.data),
        ctypes.c_int(len(lengths)),
        ctypes.c_int64(num_symbols),
        ctypes.c_int64(chunk_size),
        ctypes.c_void_p(output.ctypes.data),
        ctypes.c_void_p(status.ctypes.data),
        order=order,
    )
    table, chunk = int(status[0]), int(status[1])
    if chunk == 2**64 - 1:
        return output, table, None, 0
    return output, table, chunk >> 8, chunk & 255
