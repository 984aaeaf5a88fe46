"""pack_panels: every backend against the layout as it is documented, element by element."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co

ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params("pack_panels"), indirect=True)
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
