"""The block-sparse ops on a GPU: small cases for `gpu_verify.py`, its figures, and their peers."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_cases import DEVICE, FLOATS, PACKED_BOUNDS, Check, int8_quantizations

import compressops as co

BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128))
SIZE = 8192
# Rows, blocks and density: as many rows as columns; and few rows, which stream the blocks.
FIGURES = [
    *itertools.product((SIZE,), BLOCKS, (0.05, 0.1, 0.2, 0.3, 0.5)),
    *itertools.product((1, 16), BLOCKS, (0.1, 0.2)),
]


def blocks(
    n: int, k: int, block: tuple[int, int], density: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a random weight [n, k] for outputs of about 1."""
    grid = (-(-n // block[0]), -(-k // block[1]))
    keep = torch.rand(grid, device=DEVICE) < density
    if dtype == torch.int8:
        weight = torch.randint(-127, 128, (n, k), dtype=dtype, device=DEVICE)
    else:
        weight = (torch.randn(n, k, device=DEVICE) / max(k * density, 1) ** 0.5).to(dtype)
    return co.ops.bsr_from_dense(weight, block, keep)


def int8_arguments(
    m: int, k: int, n: int, block: tuple[int, int], density: float, dtype: torch.dtype
) -> tuple:
    """Of `bsr_int8_linear`, up to the bias."""
    *packed, sums = co.ops.bsr_int8_linear_pack(*blocks(n, k, block, density, torch.int8), n, k)
    scales = torch.rand(n, device=DEVICE) / 127 / max(k * density, 1) ** 0.5
    return torch.randn(m, k, device=DEVICE).to(dtype), *packed, scales, sums


def any_order(crow: torch.Tensor) -> torch.Tensor:
    return torch.randperm(len(crow) - 1, device=DEVICE).to(torch.int32)


def cases(op: str, small: bool) -> Iterator[Check]:
    """Blocks of whole tiles, and others, which Triton serves; ragged edges; rows in any order."""
    shapes = [(1, 200, 70, (16, 16)), (17, 136, 150, (32, 32)), (65, 97, 129, (64, 16))]
    shapes += [(5, 90, 70, (16, 4)), (9, 40, 50, (24, 20))]
    if not small:
        shapes += [(300, 1024, 1031, (128, 128)), (0, 64, 64, (16, 16)), (16, 4096, 4096, (64, 64))]
    quantizations = itertools.cycle([(None, None, True), *int8_quantizations()])
    for (m, k, n, block), dtype in itertools.product(shapes, FLOATS):
        bound = PACKED_BOUNDS[dtype]
        refused = () if block[0] % 16 == block[1] % 16 == 0 else ("cuda",)
        bias, activation = torch.randn(n, device=DEVICE), ("none", "relu", "gelu")[(m + k) % 3]
        if op == "bsr_int8_linear":
            arguments = int8_arguments(m, k, n, block, 0.5, dtype)
            order = any_order(arguments[2])
            arguments = (*arguments, bias, activation, *next(quantizations), order)
            yield Check(op, arguments, refused_by=refused)
            continue
        values, crow, col = blocks(n, k, block, 0.5, dtype)
        x, grad = (torch.randn(m, size, device=DEVICE).to(dtype) for size in (k, n))
        # Of grad_values: sums of m products, in float32 whatever the dtype.
        arguments, bound, relative = {
            "bsr_linear": (
                (x, values, crow, col, n, bias, activation, any_order(crow)),
                bound,
                bound,
            ),
            "bsr_linear_grad_x": ((grad, values, crow, col, k), 2 * bound, bound),
            "bsr_linear_grad_values": ((grad, x, crow, col, list(block)), 1e-5 * (m + 1), 1e-5),
        }[op]
        yield Check(op, arguments, bound, relative, refused_by=refused)


def conv_arguments(
    shape: tuple[int, int, int, int],
    k: int,
    kernel: tuple[int, int],
    block: tuple[int, int],
    density: float,
    dtype: torch.dtype,
) -> tuple:
    """Of `bsr_conv2d`, up to the kernel's size; channels last."""
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, *blocks(k, shape[1] * kernel[0] * kernel[1], block, density, dtype), k, list(kernel)


def conv_cases(small: bool) -> Iterator[Check]:
    """Blocks and channels of whole pieces, and others, which Triton serves."""
    shapes = [
        ((2, 16, 7, 9), 50, (3, 3), (16, 16), ([1, 1], [1, 1], [1, 1])),
        ((1, 40, 9, 5), 70, (2, 4), (32, 32), ([2, 3], [0, 2], [3, 1])),
        ((3, 8, 1, 1), 20, (1, 1), (16, 8), ([1, 1], [0, 0], [1, 1])),
        ((2, 7, 8, 6), 34, (3, 3), (16, 16), ([1, 2], [1, 0], [1, 1])),
        ((2, 16, 8, 6), 34, (3, 3), (16, 1), ([1, 1], [1, 1], [1, 1])),
    ]
    if not small:
        shapes += [((8, 64, 56, 56), 64, (3, 3), (16, 64), ([1, 1], [1, 1], [1, 1]))]
        shapes += [((0, 64, 8, 8), 64, (3, 3), (16, 16), ([1, 1], [1, 1], [1, 1]))]
    for (shape, k, kernel, block, steps), dtype in itertools.product(shapes, FLOATS):
        bound, bias = PACKED_BOUNDS[dtype], torch.randn(k, device=DEVICE)
        arguments = conv_arguments(shape, k, kernel, block, 0.5, dtype)
        whole = block[1] % 8 == shape[1] % 8 == 0
        activation, order = ("none", "relu", "gelu")[k % 3], any_order(arguments[2])
        arguments = (*arguments, bias, *steps, activation, order)
        refused = () if whole else ("cuda",)
        yield Check("bsr_conv2d", arguments, bound, bound, refused_by=refused)


LINEAR = ("bsr_linear", "bsr_linear_grad_x", "bsr_linear_grad_values", "bsr_int8_linear")
CASES: dict[str, Callable[[bool], Iterator[Check]]] = {
    **{op: functools.partial(cases, op) for op in LINEAR},
    "bsr_conv2d": conv_cases,
}


def _call(op: str, m: int, block: tuple[int, int], density: float) -> tuple[Callable, int, tuple]:
    """The op in bfloat16, how many weights are stored, and its operands x or grad, and blocks.
    Where it takes an order of their rows, it has none."""
    dtype = torch.bfloat16
    x = torch.randn(m, SIZE, device=DEVICE).to(dtype)
    if op == "bsr_int8_linear":
        arguments = int8_arguments(m, SIZE, SIZE, block, density, dtype)
        weight = arguments[1:4]
    else:
        weight = blocks(SIZE, SIZE, block, density, dtype)
        arguments = {
            "bsr_linear": (x, *weight, SIZE),
            "bsr_linear_grad_x": (x, *weight, SIZE),
            "bsr_linear_grad_values": (x, torch.randn_like(x), *weight[1:], list(block)),
        }[op]
    call = functools.partial(getattr(torch.ops.compressops, op), *arguments)
    return call, weight[0].numel(), (x, *weight)


def _torch_bsr(x: torch.Tensor, values, crow, col) -> Iterator[tuple[str, Callable]]:
    """torch's product with the same blocks, as it is and after its own tuning."""
    from torch.sparse import _triton_ops, _triton_ops_meta

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.sparse_bsr_tensor(crow.long(), col.long(), values, (SIZE, SIZE))
    yield "torch BSR", functools.partial(F.linear, x, weight)
    out = x.new_zeros(SIZE, x.shape[0])
    _triton_ops_meta.tune_bsr_dense_addmm(out, weight, x.t(), beta=0, alpha=1, store=True)
    tuned = functools.partial(_triton_ops.bsr_dense_addmm, out, weight, x.t(), beta=0, alpha=1)
    yield "torch BSR, tuned", tuned


# Images, output channels and blocks of 3 × 3 convolutions, of ResNet's.
CONV_FIGURES = [
    ((32, 64, 56, 56), 64, (16, 16)),
    ((32, 256, 14, 14), 256, (32, 32)),
    ((32, 512, 7, 7), 512, (64, 64)),
    ((32, 256, 14, 14), 256, (16, 1)),
]


def conv_rows(seconds: Callable[[list[Callable], int], float]) -> Callable:
    """As `rows`, of `bsr_conv2d`, beside the dense convolution; η as there."""

    def measure(backend: str, rounds: int) -> Iterator[dict]:
        for (shape, k, block), density in itertools.product(CONV_FIGURES, (0.1, 0.2)):
            if backend == "cuda" and block[1] % 8:
                continue
            arguments = conv_arguments(shape, k, (3, 3), block, density, torch.bfloat16)
            steps = (None, [1, 1], [1, 1], [1, 1])
            call = functools.partial(torch.ops.compressops.bsr_conv2d, *arguments, *steps)
            x, stored = arguments[0], arguments[1].numel()
            dense = torch.randn(k, shape[1], 3, 3, device=DEVICE).to(x)
            dense = dense.contiguous(memory_format=torch.channels_last)
            with co.backend(backend):
                ours = seconds([call], rounds)
            peer = seconds([functools.partial(F.conv2d, x, dense, None, 1, 1)], rounds)
            pixels = shape[0] * shape[2] * shape[3]
            traffic = 2 * (stored + x.numel() + pixels * k)
            yield {
                **{"op": "bsr_conv2d", "backend": backend},
                "case": f"{list(shape)} to {k}, 3×3, bf16, {block[0]}×{block[1]}, {density:.0%}",
                **{"µs": ours * 1e6, "TOP/s": 2 * pixels * stored / ours / 1e12},
                **{"GB/s": traffic / ours / 1e9, "× peer": peer / ours},
                "peer": f"torch bf16 dense, η {stored / dense.numel() * peer / ours:.2f}",
            }

    return measure


def rows(op: str, seconds: Callable[[list[Callable], int], float]) -> Callable:
    """The figures of an op, for `gpu_verify.FIGURES`; ``seconds`` measures a call in rounds.

    η, in the column of the peer, is density × dense time / ours. torch's BSR stands beside it.
    """

    def measure(backend: str, rounds: int) -> Iterator[dict]:
        for m, block, density in FIGURES:
            call, stored, (x, *weight) = _call(op, m, block, density)
            dense = torch.randn(SIZE, SIZE, device=DEVICE).to(x.dtype)
            with co.backend(backend):
                ours = seconds([call], rounds)
            if op == "bsr_linear_grad_values":
                theirs = functools.partial(torch.mm, x.t(), torch.randn_like(x))
            else:
                theirs = functools.partial(F.linear, x, dense)
            peer = seconds([theirs], rounds)
            said = [f"torch bf16 dense, η {stored / SIZE**2 * peer / ours:.2f}"]
            if op in ("bsr_linear", "bsr_int8_linear"):
                order = co.ops.bsr_row_order(*weight[1:], block, SIZE, SIZE)
                with co.backend(backend):
                    alike = seconds([functools.partial(call, row_order=order)], rounds)
                said.append(f"with likes together: {alike / ours:.2f} of the time")
            if op == "bsr_linear" and m % 16 == 0:
                for name, other in _torch_bsr(x, *weight):
                    said.append(f"{name}: {seconds([other], rounds) / ours:.2f} times as long")
            traffic = weight[0].element_size() * stored + 4 * m * SIZE
            yield {
                **{"op": op, "backend": backend},
                "case": f"{m}×{SIZE}×{SIZE} bf16, {block[0]}×{block[1]}, {density:.0%}",
                **{"µs": ours * 1e6, "TOP/s": 2 * m * stored / ours / 1e12},
                **{"GB/s": traffic / ours / 1e9, "× peer": peer / ours, "peer": "; ".join(said)},
            }

    return measure
