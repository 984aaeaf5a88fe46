"""huffman_decode_planes: every backend against the codes that were split and encoded."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops.formats.huffman import huffman_encode_reference, huffman_lengths
from compressops.formats.planes import code_dtype, decode_planes_reference, split_planes

PARAMS = kernel_params("huffman_decode_planes")
ALL_KERNELS = pytest.mark.parametrize("kernel", PARAMS, indirect=True)
# Triton's interpreter takes a millisecond a symbol.
FAST_KERNELS = pytest.mark.parametrize(
    "kernel", [p for p in PARAMS if p.values[0][:2] != ("cpu", "triton")], indirect=True
)


def arguments(codes: torch.Tensor, coded: tuple[int, ...], chunk_size: int, turned: bool) -> tuple:
    """What the op takes behind ``out``, with the planes ``coded`` as streams."""
    planes, offsets, lengths = [], [], []
    for p, plane in enumerate(split_planes(codes, 8 * codes.element_size(), turned)):
        code = torch.empty(0, dtype=torch.uint8)
        edges = torch.empty(0, dtype=torch.int64)
        if p in coded:
            code = huffman_lengths(torch.bincount(plane, minlength=256))
            plane, edges = huffman_encode_reference(plane, code, chunk_size)
        planes.append(plane)
        offsets.append(edges)
        lengths.append(code)
    return planes, offsets, lengths, chunk_size, turned


def to(device: torch.device, args: tuple) -> tuple:
    return *([t.to(device) for t in tensors] for tensors in args[:3]), *args[3:]


def decoded(args: tuple, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # What is not written is seen, and so is what is written behind the end.
    same = code_dtype(8 * dtype.itemsize)
    out, behind = torch.full((count + 70,), 7, dtype=same, device=device).split([count, 70])
    assert co.ops.huffman_decode_planes(out.view(dtype), *args) is None
    assert bool((behind == 7).all())
    return out.cpu()


def gaussian(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count).to(dtype).view(code_dtype(8 * dtype.itemsize))


@FAST_KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 70_001])
@pytest.mark.parametrize("chunk_size", [1000, 32768])
def test_floats(kernel, dtype: torch.dtype, count: int, chunk_size: int) -> None:
    codes = gaussian(count, dtype)
    planes = dtype.itemsize
    for coded in ((planes - 1,), tuple(range(planes)), (0,), ()):
        args = to(kernel, arguments(codes, coded if count else (), chunk_size, True))
        assert torch.equal(decoded(args, count, dtype, kernel), codes)


@ALL_KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_plane_some_and_a_plane_of_one_symbol(kernel, dtype: torch.dtype) -> None:
    codes, last = gaussian(50, dtype), dtype.itemsize - 1
    for coded, turned in (((last,), True), ((0, last), True), ((0,), False)):
        codes = codes if turned else codes & -256
        args = to(kernel, arguments(codes, coded, 30, turned))
        assert torch.equal(decoded(args, 50, dtype, kernel), codes)


@FAST_KERNELS
def test_what_is_larger_than_the_caches(kernel) -> None:
    # 2^24 bytes are written another way where they are aligned; an odd chunk ends in between.
    block = gaussian(100_000, torch.bfloat16)
    planes, offsets, lengths, *rest = arguments(block, (1,), 1000, True)
    copies = 90
    sizes = offsets[1].diff().repeat(copies)
    many = (
        [planes[0].repeat(copies), planes[1].repeat(copies)],
        [offsets[0], torch.nn.functional.pad(sizes.cumsum(0), (1, 0))],
        lengths,
        *rest,
    )
    many = to(kernel, many)
    count = copies * block.numel()
    whole = torch.empty(count + 1, dtype=torch.int16, device=kernel)
    for start in (0, 1):
        out = whole[start : start + count]
        co.ops.huffman_decode_planes(out, *many)
        assert torch.equal(out.view(copies, -1).cpu(), block.expand(copies, -1))


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300),
    st.sets(st.integers(0, 3)),
    st.integers(1, 100),
    st.booleans(),
)
def test_any_codes(values: list[int], coded: set[int], chunk_size: int, turned: bool) -> None:
    codes = torch.tensor(values, dtype=torch.int64).to(torch.int32)
    args = arguments(codes, tuple(coded), chunk_size, turned)
    assert torch.equal(decoded(args, len(values), torch.int32, torch.device("cpu")), codes)
    out = torch.empty_like(codes)
    decode_planes_reference(out, *args)
    assert torch.equal(out, codes)


@ALL_KERNELS
def test_corrupt_streams_are_errors(kernel) -> None:
    codes = gaussian(5000, torch.bfloat16)
    planes, offsets, lengths, *rest = arguments(codes, (1,), 1000, True)
    out = torch.empty(5000, dtype=torch.bfloat16, device=kernel)
    for chunk in (0, 3):
        broken = planes[1].clone()
        broken[int(offsets[1][chunk]) + 50] ^= 4
        args = to(kernel, ([planes[0], broken], offsets, lengths, *rest))
        with pytest.raises(ValueError, match=f"chunk {chunk}"):
            co.ops.huffman_decode_planes(out, *args)
    wrong = lengths[1].clone()
    wrong[int(wrong.nonzero()[0])] += 1
    args = to(kernel, (planes, offsets, [lengths[0], wrong], *rest))
    with pytest.raises(ValueError, match="lengths"):
        co.ops.huffman_decode_planes(out, *args)


GOOD = arguments(gaussian(50, torch.bfloat16), (1,), 20, True)
OUT = torch.empty(50, dtype=torch.bfloat16)
BAD = {
    "out of bytes": (OUT.view(torch.uint8), *GOOD),
    "a strided out": (torch.empty(100, dtype=torch.bfloat16)[::2], *GOOD),
    "a longer out": (torch.empty(51, dtype=torch.bfloat16), *GOOD),
    "too few planes": (OUT, GOOD[0][:1], *GOOD[1:]),
    "too few offsets": (OUT, GOOD[0], GOOD[1][:1], *GOOD[2:]),
    "too many lengths": (OUT, *GOOD[:2], [*GOOD[2], GOOD[2][0]], *GOOD[3:]),
    "lengths of an empty matrix": (OUT, *GOOD[:2], [GOOD[2][0].view(0, 3), GOOD[2][1]], *GOOD[3:]),
    "int64 lengths, none": (OUT, *GOOD[:2], [GOOD[2][0].long(), GOOD[2][1]], *GOOD[3:]),
    "a matrix of offsets": (OUT, GOOD[0], [GOOD[1][0][None], GOOD[1][1]], *GOOD[2:]),
    "int32 offsets": (OUT, GOOD[0], [o.int() for o in GOOD[1]], *GOOD[2:]),
    "one offset less": (OUT, GOOD[0], [GOOD[1][0], GOOD[1][1][:-1]], *GOOD[2:]),
    "a short raw plane": (OUT, [GOOD[0][0][1:], GOOD[0][1]], *GOOD[1:]),
    "a chunk size of 0": (OUT, *GOOD[:3], 0, True),
    "a chunk size of 32769": (OUT, *GOOD[:3], 32769, True),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_bad_arguments_are_named(case: str, native: bool, backend: str) -> None:
    namespace = torch.ops.compressops_native if native else co.ops
    with (
        co.backend(backend),
        pytest.raises(ValueError, match=r"decode_planes: argument '\w+' must be .*, got "),
    ):
        namespace.huffman_decode_planes(*BAD[case])


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kernel", [p for p in PARAMS if p.values[0][1] == "triton"], indirect=True)
def test_triton_names_bad_arguments_too(case: str, kernel) -> None:
    out, *rest = BAD[case]
    with pytest.raises(ValueError, match=r"decode_planes: argument '\w+' must be .*, got "):
        co.ops.huffman_decode_planes(out.to(kernel), *to(kernel, rest))


@ALL_KERNELS
def test_opcheck(kernel) -> None:
    op = torch.ops.compressops.huffman_decode_planes.default
    torch.library.opcheck(op, (OUT.to(kernel), *to(kernel, GOOD)))


def test_compiles_to_one_graph() -> None:
    def layer(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(50, dtype=torch.bfloat16)
        co.ops.huffman_decode_planes(out, [first, second], *GOOD[1:])
        return out.view(torch.int16) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*GOOD[0]), layer(*GOOD[0]))
