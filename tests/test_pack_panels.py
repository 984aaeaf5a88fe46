"""pack_panels: every backend against the layout as it is documented, element by element."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co

ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params("pack_panels"), indirect=True)
NATIVE = pytest.mark.skipif(
    all(p.values[0][1] != "cpu" for p in kernel_params("pack_panels")),
    reason="PyTorch's own operations serve",
)
SHAPES = [
    (0, 0, 1), (0, 5, 2), (3, 0, 1), (4, 4, 0), (1, 1, 1), (16, 64, 1), (17, 63, 1), (15, 65, 1),
    (32, 256, 1), (33, 257, 1), (49, 255, 2), (48, 130, 9), (5, 3, 9), (65, 300, 1), (70, 40, 4),
]  # fmt: skip


def expected(codes: torch.Tensor, bits: int, zero: int) -> list[int]:
    """Bytes, by the docstring."""
    (N, K, taps), inputs, panel = codes.shape, 32 // bits, 16 if bits == 8 else 32
    values, found = codes.tolist(), []
    for first in range(0, -(-N // 16) * 16, panel):
        width = min(panel, -(-N // 16) * 16 - first)
        for tap in range(taps):
            for word in range(-(-K // inputs)):
                for n in range(first, first + width):
                    for i in range(4):
                        byte = 0
                        for j in range(8 // bits):
                            k = word * inputs + 4 * j + i
                            if n < N and k < K:
                                code = (values[n][k][tap] + zero) % 2**bits
                                byte |= code << (j * bits)
                        found.append(byte)
    return found


def packed(codes: torch.Tensor, bits: int, zero: int, sums: torch.Tensor | None = None):
    (N, K, taps), inputs = codes.shape, 32 // bits
    size = 4 * -(-N // 16) * 16 * taps * -(-K // inputs)
    # What is not written is seen, and so is what is written behind the end.
    room = torch.full((size + 70,), 77, dtype=torch.uint8, device=codes.device)
    out, behind = room.split([size, 70])
    co.ops.pack_panels(out, codes, bits, zero, sums)
    assert bool((behind == 77).all())
    return out


@ALL_KERNELS
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_documented(kernel, bits: int, shape: tuple[int, int, int]) -> None:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    zero = {2: 1, 4: 8, 8: 0}[bits]
    sums = torch.full((shape[0],), 5, dtype=torch.int32).to(kernel) if bits == 8 else None
    # Rows begin anywhere in memory.
    room = torch.empty(codes.numel() + 3, dtype=torch.int8, device=kernel)
    placed = room[3:].view(shape).copy_(codes)
    out = packed(placed, bits, zero, sums)
    assert out.tolist() == expected(codes, bits, zero)
    if sums is not None:
        assert torch.equal(sums.cpu(), codes.sum((1, 2), dtype=torch.int32))


@ALL_KERNELS
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(530, 1111, 1), (197, 300, 9), (40, 70_001, 1)], ids=str)
def test_more_than_a_thread_takes(kernel, bits: int, shape: tuple[int, int, int]) -> None:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    zero = {2: 3, 4: 5, 8: 0}[bits]
    with co.backend("eager"):
        reference = packed(codes, bits, zero)
    sums = torch.full((shape[0],), 5, dtype=torch.int32, device=kernel) if bits == 8 else None
    assert torch.equal(packed(codes.to(kernel), bits, zero, sums).cpu(), reference)
    if sums is not None:
        assert torch.equal(sums.cpu(), codes.sum((1, 2), dtype=torch.int32))


@given(
    st.integers(0, 70),
    st.integers(0, 400),
    st.integers(1, 3),
    st.sampled_from([2, 4, 8]),
    st.integers(0, 2**32),
)
def test_random_shapes(n: int, k: int, taps: int, bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k, taps), dtype=torch.int8)
    zero = seed % 2**bits if bits < 8 else 0
    with co.backend("eager"):
        reference = packed(codes, bits, zero)
    assert torch.equal(packed(codes, bits, zero), reference)


BESIDE_GUARDS = """
import ctypes, mmap, torch
import compressops as co
from compressops import _C

def guarded(count, dtype):
    size, page = count * dtype.itemsize, mmap.PAGESIZE
    end = -(-size // page) * page
    memory = mmap.mmap(-1, end + page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + end), page, 0) == 0
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=end - size)

for n, k, taps in ((17, 63, 1), (15, 64, 1), (33, 257, 2), (16, 3, 9), (1, 1, 1)):
    codes = guarded(n * k * taps, torch.int8).view(n, k, taps).random_(-128, 128)
    for bits in (2, 4, 8):
        size = -(-n // 16) * 64 * taps * -(-k // (32 // bits))
        with co.backend("eager"):
            expected = torch.empty(size, dtype=torch.uint8)
            co.ops.pack_panels(expected, codes, bits)
        for isa in ("baseline", "avx2", "native"):
            _C.limit_isa(isa)
            out, sums = guarded(size, torch.uint8), guarded(n, torch.int32) if bits == 8 else None
            co.ops.pack_panels(out, codes, bits, 0, sums)
            assert torch.equal(out, expected)
            assert sums is None or torch.equal(sums, codes.sum((1, 2), dtype=torch.int32))
"""


@NATIVE
def test_touches_nothing_behind_its_tensors() -> None:
    """Behind codes, panels and sums is memory that nobody may read or write."""
    done = subprocess.run([sys.executable, "-c", BESIDE_GUARDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CODES, OUT = torch.zeros(3, 8, 1, dtype=torch.int8), torch.zeros(128, dtype=torch.uint8)
SUMS = torch.zeros(3, dtype=torch.int32)
BAD = {
    "a short out": (OUT[:-1], CODES, 8),
    "a float out": (OUT.float(), CODES, 8),
    "a strided out": (torch.zeros(256, dtype=torch.uint8)[::2], CODES, 8),
    "uint8 codes": (OUT, CODES.view(torch.uint8), 8),
    "a matrix": (OUT, CODES[..., 0], 8),
    "strided codes": (OUT, torch.zeros(3, 16, 1, dtype=torch.int8)[:, ::2], 8),
    "three bits": (OUT, CODES, 3),
    "no bits": (OUT, CODES, 0),
    "a zero of 8 bits": (OUT, CODES, 8, 1),
    "a negative zero": (OUT[:64], CODES, 4, -1),
    "a large zero": (OUT[:64], CODES, 4, 16),
    "sums of 4 bits": (OUT[:64], CODES, 4, 8, SUMS),
    "int64 sums": (OUT, CODES, 8, 0, SUMS.long()),
    "short sums": (OUT, CODES, 8, 0, SUMS[:2]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_bad_arguments_are_named(case: str, native: bool, backend: str) -> None:
    op = torch.ops.compressops_native.pack_panels if native else co.ops.pack_panels
    with (
        co.backend(backend),
        pytest.raises(ValueError, match=r"pack_panels: argument '\w+' must be .*, got "),
    ):
        op(*BAD[case])


@ALL_KERNELS
def test_opcheck(kernel) -> None:
    codes = torch.randint(-128, 128, (20, 30, 2), dtype=torch.int8).to(kernel)
    out = torch.zeros(2 * 16 * 32 * 2, dtype=torch.int8, device=kernel)
    sums = torch.zeros(20, dtype=torch.int32, device=kernel)
    torch.library.opcheck(torch.ops.compressops.pack_panels.default, (out, codes, 8, 0, sums))
    small = torch.zeros(32 * 4 * 4 * 2, dtype=torch.uint8, device=kernel)
    torch.library.opcheck(torch.ops.compressops.pack_panels.default, (small, codes, 4, 8))


def test_compiles_to_one_graph() -> None:
    codes = torch.randint(-128, 128, (20, 32), dtype=torch.int8)

    def layer(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        weight, sums = co.ops.int8_linear_pack(codes)
        return co.ops.int8_linear(x, weight, scales, sums)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    args = torch.randn(3, 32), codes, torch.rand(20)
    assert torch.equal(compiled(*args), layer(*args))


@pytest.mark.parametrize("op", ["int8_linear", "int8_conv2d", "int4_linear", "ternary_linear"])
def test_packs_into_memory_that_is_given(op: str) -> None:
    pack = getattr(co.ops, f"{op}_pack")
    shape = (20, 12, 3, 3) if op == "int8_conv2d" else (20, 48)
    args = [torch.randint(-1, 2, shape, dtype=torch.int8)]
    if op in ("int4_linear", "ternary_linear"):
        args.append(torch.rand(20, 1))
    weight, *_ = pack(*args)
    out = torch.full_like(weight, 77)
    found, *_ = pack(*args, out=out)
    assert found is out
    assert torch.equal(out, weight)
    with pytest.raises(ValueError, match=f"{op}_pack: argument 'out' must be contiguous"):
        pack(*args, out=out[:-1])
