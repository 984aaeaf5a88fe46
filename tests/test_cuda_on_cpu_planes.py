"""The CUDA kernels of huffman_decode_planes and merge_planes, run on a CPU."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from cuda_on_cpu import harness
from cuda_on_cpu.huffman_streams import encode, lengths_for

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")
NO_BAD_CHUNK = 2**64 - 1


def decode(
    library: ctypes.CDLL,
    planes: list[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]],
    count: int,
    chunk_size: int,
    turned: bool,
    shift: int = 0,
    order: str = "forward",
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and [table error, chunk and error] of each plane; ``shift`` moves all that is read
    and written."""
    dtype = np.dtype(f"<u{len(planes)}")
    out = np.full(count + shift, 0x5A5A, dtype)[shift:]
    status = np.zeros((len(planes), 2), np.uint64)
    moved = [
        np.concatenate([np.zeros(shift + p, np.uint8), plane[0]])[shift + p :]
        for p, plane in enumerate(planes)
    ]

    def pointers(arrays: list[np.ndarray | None]) -> ctypes.Array:
        found = [None if array is None else array.ctypes.data for array in arrays]
        return (ctypes.c_void_p * len(found))(*found)

    harness._call(
        library.run_huffman_decode_planes,
        *(ctypes.c_void_p(out.ctypes.data), ctypes.c_int(len(planes)), ctypes.c_int64(count)),
        pointers(moved),
        (ctypes.c_int64 * len(planes))(*map(len, moved)),
        pointers([plane[1] for plane in planes]),
        pointers([plane[2] for plane in planes]),
        (ctypes.c_int * len(planes))(*(0 if p[2] is None else len(p[2]) for p in planes)),
        *(ctypes.c_int64(chunk_size), ctypes.c_int(turned)),
        ctypes.c_void_p(status.ctypes.data),
        order=order,
    )
    return out, status


def split(codes: np.ndarray, coded: tuple[int, ...], chunk_size: int, turned: bool) -> list:
    """Planes of the codes, those in ``coded`` as streams."""
    bits = 8 * codes.dtype.itemsize
    if turned:
        codes = codes << 1 | codes >> (bits - 1)
    planes = []
    for p in range(bits // 8):
        symbols = (codes >> 8 * p & 255).astype(np.uint8)
        if p not in coded:
            planes.append((symbols, None, None))
            continue
        lengths = lengths_for(np.bincount(symbols, minlength=256))
        planes.append((*encode(symbols, lengths, chunk_size), lengths))
    return planes


def floats(count: int, dtype: str) -> np.ndarray:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32).view("<u4")
    return values if dtype == "<u4" else (values >> 16).astype("<u2")


@pytest.fixture(scope="module")
def library():
    return harness.build("huffman_decode_planes")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize(("count", "chunk_size"), [(1, 1), (15, 100), (50, 7), (1000, 300)])
def test_huffman_decode_planes(library, dtype, count, chunk_size, turned):
    codes = floats(count, dtype)
    planes = codes.dtype.itemsize
    choices = [(), (planes - 1,), (0,), tuple(range(planes)), (0, planes - 1)]
    for (shift, order), coded in zip(
        itertools.cycle(enumerate(harness.ORDERS)), choices, strict=False
    ):
        made = split(codes, coded, chunk_size, turned)
        out, status = decode(library, made, count, chunk_size, turned, shift, order)
        np.testing.assert_array_equal(out, codes)
        assert (status == [0, NO_BAD_CHUNK]).all()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("count", [0, 1, 7, 16, 17, 4096, 4097, 9000])
def test_merge_planes(library, dtype, count):
    codes = floats(count, dtype)
    for shift, turned in itertools.product(range(9), (False, True)):
        out, _ = decode(library, split(codes, (), 1, turned), count, 1, turned, shift)
        np.testing.assert_array_equal(out, codes)


def test_faults_are_noted_by_plane(library):
    codes = floats(500, "<u2")
    for broken in (0, 1):
        planes = split(codes, (0, 1), 100, True)
        stream, offsets, _ = planes[broken]
        stream[offsets[3] + 9] ^= 4
        _, status = decode(library, planes, 500, 100, True)
        assert status[1 - broken].tolist() == [0, NO_BAD_CHUNK]
        assert status[broken, 1] >> 8 == 3
    planes = split(codes, (1,), 100, True)
    planes[1][2][planes[1][2].nonzero()[0][0]] += 1
    out, status = decode(library, planes, 500, 100, True)
    assert status[1, 0] != 0
    assert (out == 0x5A5A).all()


PLANTS = [
    harness.Plant("merge_planes.cuh", "min(int64_t{16}, codes.count - first)", "16"),
    harness.Plant("merge_planes.cuh", "(at & 3) * 8", "(at & 2) * 8"),
    harness.Plant("merge_planes.cuh", "(at >> 2) + w + 1", "(at >> 2) + w"),
    harness.Plant("merge_planes.cuh", "if (from > 0 || to < 16) {", "if (from > 0) {"),
    harness.Plant("huffman_decode_planes.cuh", "codes.begun = true;", ""),
    harness.Plant("huffman_decode_planes.cuh", "turned && which == 0", "turned"),
]


def check(library: ctypes.CDLL) -> None:
    codes = floats(100, "<u2")
    for shift, coded in itertools.product(range(3), ((), (0, 1))):
        out, _ = decode(library, split(codes, coded, 70, True), 100, 70, True, shift)
        np.testing.assert_array_equal(out, codes)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.old)
def test_planted_mistakes_are_found(plant):
    library = harness.build("huffman_decode_planes", plant)
    with pytest.raises(AssertionError):
        check(library)
