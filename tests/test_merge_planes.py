"""merge_planes: every backend against the reference, and back from split_planes."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops.formats.planes import code_dtype, split_planes

ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params("merge_planes"), indirect=True)
FLOATS = {16: (torch.bfloat16, torch.float16), 32: (torch.float32,)}


def random_codes(count: int, bits: int) -> torch.Tensor:
    high = 2 ** (bits - 1)
    return torch.randint(-high, high, (count,), dtype=torch.int64).to(code_dtype(bits))


def merged(planes: list[torch.Tensor], dtype: torch.dtype, turned: bool) -> torch.Tensor:
    # What is not written is seen, and so is what is written behind the end.
    room = torch.full((planes[0].numel() + 70,), 7, dtype=torch.uint8, device=planes[0].device)
    room = torch.full_like(room, 7, dtype=code_dtype(dtype.itemsize * 8)).view(dtype)
    out, behind = room.split([planes[0].numel(), 70])
    co.ops.merge_planes(out, planes, turned)
    assert bool((behind.view(code_dtype(dtype.itemsize * 8)) == 7).all())
    return out


@ALL_KERNELS
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 1000, 70_001, 200_003])
def test_gives_back_what_was_split(kernel, bits: int, turned: bool, count: int) -> None:
    codes = random_codes(count, bits)
    planes = [plane.to(kernel) for plane in split_planes(codes, bits, turned)]
    for dtype in (codes.dtype, *FLOATS[bits]):
        out = merged(planes, dtype, turned)
        assert out.device == kernel
        assert torch.equal(out.view(codes.dtype).cpu(), codes)


@ALL_KERNELS
def test_every_float_of_16_bits(kernel) -> None:
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    planes = split_planes(codes, 16, turned=True)
    # The eight bits below the sign, and the sign at the bottom.
    assert torch.equal(planes[1].int(), (codes.int() >> 7) & 255)
    assert torch.equal(planes[0].int() & 1, (codes < 0).int())
    out = merged([plane.to(kernel) for plane in planes], torch.bfloat16, True)
    assert torch.equal(out.view(torch.int16).cpu(), codes)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200), st.booleans(), st.integers(0, 3))
def test_unaligned_parts_of_planes(values: list[int], turned: bool, start: int) -> None:
    codes = torch.tensor(values, dtype=torch.int64).to(torch.int32)
    planes = [plane[start:] for plane in split_planes(codes, 32, turned)]
    assert torch.equal(merged(planes, torch.int32, turned), codes[start:])


@pytest.mark.parametrize("count", [1, 2])
def test_planes_share_no_memory_with_the_codes(count: int) -> None:
    codes = torch.full((count,), -1, dtype=torch.int16)
    assert split_planes(codes, 12)[1].tolist() == [15] * count
    assert codes.tolist() == [-1] * count


BYTES = torch.zeros(6, dtype=torch.uint8)
BAD = {
    "an int64 out": (torch.zeros(6, dtype=torch.int64), [BYTES] * 8),
    "a matrix": (torch.zeros(2, 3), [BYTES] * 4),
    "a strided out": (torch.zeros(12)[::2], [BYTES] * 4),
    "too few planes": (torch.zeros(6), [BYTES] * 3),
    "too many planes": (torch.zeros(6, dtype=torch.int16), [BYTES] * 4),
    "no planes": (torch.zeros(6), []),
    "a short plane": (torch.zeros(6), [BYTES] * 3 + [BYTES[:5]]),
    "a strided plane": (torch.zeros(3), [BYTES[:3]] * 3 + [BYTES[::2]]),
    "an int8 plane": (torch.zeros(6), [BYTES] * 3 + [BYTES.view(torch.int8)]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_bad_arguments_are_named(case: str, native: bool, backend: str) -> None:
    out, planes = BAD[case]
    op = torch.ops.compressops_native.merge_planes if native else co.ops.merge_planes
    with (
        co.backend(backend),
        pytest.raises(ValueError, match=r"merge_planes: argument '\w+' must be .*, got "),
    ):
        op(out, planes, True)


@ALL_KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32])
def test_opcheck(kernel, dtype: torch.dtype) -> None:
    planes = [torch.randint(0, 256, (77,), dtype=torch.uint8).to(kernel)] * dtype.itemsize
    out = torch.zeros(77, dtype=dtype, device=kernel)
    torch.library.opcheck(torch.ops.compressops.merge_planes.default, (out, planes, True))


def test_compiles_to_one_graph() -> None:
    planes = split_planes(random_codes(300, 16), 16)

    def layer(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(300, dtype=torch.int16)
        co.ops.merge_planes(out, [first, second])
        return out + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*planes), layer(*planes))
