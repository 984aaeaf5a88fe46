"""The CUDA kernels, run on a CPU: results, and every access within bounds and free of races."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import harness
from cuda_on_cpu.huffman_streams import decode_chunk, encode, framed, lengths_for, seal

from compressops import backend
from compressops.ops import int8_linear

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")
ORDERS = tuple(harness.ORDERS)


@pytest.fixture(scope="module")
def int8_library():
    return harness.build("int8_linear")


@pytest.fixture(scope="module")
def huffman_library():
    return harness.build("huffman_decode")


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str = "none"
    kernel: str = "auto"


SIZES = (0, 1, 7, 16, 17, 64, 129)
# Each size of the grid with several of the others, rather than with all.
GRID = [
    Case(M, N, SIZES[(i + 3 * j + shift) % 7])
    for (i, M), (j, N) in itertools.product(enumerate(SIZES), repeat=2)
    for shift in (0, 4)
]
FORCED = [
    *(Case(1, 9, K, kernel="rows1") for K in (0, 15, 16, 512, 528, 1040)),
    *(Case(M, 9, K, kernel="rows4") for M in (1, 3, 4) for K in (33, 48)),
    *(Case(M, 17, K, kernel="rows16") for M in (5, 16) for K in (33, 48)),
    *(Case(M, N, K, kernel="tile64") for M, N in ((3, 5), (64, 64), (65, 130)) for K in (0, 9, 64)),
    Case(70, 66, 64 * 9 + 16, kernel="tile64"),  # more steps than stages
    Case(65, 64, 64 * 5 + 7, kernel="tile64"),
    Case(128, 128, 64, kernel="tile128"),
    Case(129, 131, 64 * 6 + 32, kernel="tile128"),
    Case(5, 3, 21, kernel="tile128"),
    Case(64 * 9 + 1, 65, 16, kernel="tile64"),  # more than one group of tile rows
    *(Case(1, 8, K, kernel="wgmma128") for K in (16, 128, 144)),
    *(Case(70, 136, K, kernel="wgmma128") for K in (128 * 6, 128 * 7 + 112)),
    Case(128 * 3 + 5, 264, 272, kernel="wgmma128"),  # more tiles than blocks
    Case(129, 264, 128 * 5, kernel="wgmma256"),
    Case(257, 520, 96, kernel="wgmma256"),
]
DTYPES = [
    Case(M, N, 80, dtype, activation=activation, kernel=kernel)
    for M, N, kernel in ((3, 18, "auto"), (20, 18, "auto"), (20, 24, "wgmma128"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for activation in ("none", "relu", "gelu")
]


def make(case: Case) -> tuple[torch.Tensor, ...]:
    x = torch.randn(case.M, case.K).to(case.dtype)
    weight = torch.randint(-128, 128, (case.N, case.K), dtype=torch.int8)
    scales = torch.rand(case.N) / 127
    return x, weight, scales, torch.randn(case.N) if case.bias else None


def reference(x, weight, scales, bias, activation) -> torch.Tensor:
    """As ``ops.int8_linear`` defines it: int64 sums, then float32 with each operation rounded."""
    values, top = x.float(), torch.tensor(127.0)
    amax = values.abs().amax(1, keepdim=True) if x.shape[1] else torch.zeros(x.shape[0], 1)
    inverse = torch.where(amax > 0, top / amax, 0.0)
    finite = amax.isfinite()
    q = torch.where(finite, values * inverse, 0.0).nan_to_num(0.0).clamp(-127, 127).round().long()
    y = (q @ weight.long().T).float() * (torch.where(finite, amax / top, torch.nan) * scales)
    if bias is not None:
        y = y + bias
    if activation == "relu":
        y = y.relu()
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, activation: str) -> None:
    if activation == "gelu":  # erf differs between libraries by an ulp or two
        torch.testing.assert_close(actual, expected, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [*GRID, *FORCED, *DTYPES], ids=str)
def test_int8_linear(int8_library, case):
    args = make(case)
    order = ORDERS[(case.M + case.N + case.K) % len(ORDERS)]
    y = harness.int8_linear(
        int8_library, *args, case.activation, kernel=case.kernel, order=order, max_blocks=5
    )
    assert_same(y, reference(*args, case.activation), case.activation)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["rows16", "tile64", "tile128", "wgmma128", "wgmma256"])
def test_int8_linear_in_every_order(int8_library, kernel, order):
    args = make(Case(16, 72, 1040, bias=False))
    y = harness.int8_linear(int8_library, *args, kernel=kernel, order=order)
    assert_same(y, reference(*args, "none"), "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_linear_of_misaligned_and_strided_memory(int8_library, dtype):
    M, N, K = 5, 6, 64
    _, weight, scales, bias = make(Case(M, N, K))
    weight = torch.cat([torch.zeros(1, dtype=torch.int8), weight.flatten()])[1:].view(N, K)
    for columns, first in ((K, 0), (K + 1, 1), (K + 16, 8), (K + 8, 3)):
        x = torch.randn(M, columns + 16).to(dtype)[:, first : first + K]
        y = harness.int8_linear(int8_library, x, weight, scales, bias)
        assert_same(y, reference(x, weight, scales, bias, "none"), "none")


@pytest.mark.parametrize("kernel", ["rows16", "tile64", "wgmma128"])
def test_int8_linear_of_special_values(int8_library, kernel):
    x, weight, scales, bias = make(Case(10, 8, 32))
    x[0, 3], x[1, 19], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3] = 0
    x[4] *= 1e-38  # 127 / amax overflows
    x[5], x[5, 7] = 0, 1e-45
    x[6] *= 1e36
    x[7] = torch.arange(32) - 16 + 0.5  # halves round to even
    x[7, 0] = 127
    for activation in ("none", "relu", "gelu"):
        y = harness.int8_linear(int8_library, x, weight, scales, bias, activation, kernel=kernel)
        assert_same(y, reference(x, weight, scales, bias, activation), activation)
        assert y[:3].isnan().all()
        assert not y[3:].isnan().any()


@pytest.mark.parametrize(("N", "K"), [(264, 32), (264, 48), (268, 32), (264, 40), (12, 30)])
@pytest.mark.parametrize("first", [0, 8])
def test_int8_linear_of_hopper(int8_library, N, K, first):
    """What TMA cannot read, or the epilogue not write, goes to the other kernels."""
    x, weight, scales, bias = make(Case(300, N, K))
    weight = torch.cat([torch.zeros(first, dtype=torch.int8), weight.flatten()])[first:].view(N, K)
    y = harness.int8_linear(int8_library, x, weight, scales, bias, capability=90)
    assert_same(y, reference(x, weight, scales, bias, "none"), "none")
    if first or N % 8 or K % 16:
        with pytest.raises(harness.KernelError, match="launch failed"):
            harness.int8_linear(int8_library, x, weight, scales, bias, kernel="wgmma128")


@pytest.mark.parametrize("kernel", ["rows16", "tile64", "wgmma128"])
@pytest.mark.parametrize("how", ["asymmetric", "static", "static with a zero point"])
def test_int8_linear_of_other_quantizations(int8_library, how, kernel):
    """Bit for bit the result of the op's reference."""
    x, weight, scales, bias = make(Case(14, 24, 100))
    x[0] += 3  # low is 0
    x[1] -= 3
    x[2], x[3] = 0, x[3] * 1e-38  # 127.5 / range overflows
    x[4], x[4, 5] = 0, -1e-45
    x[5] *= 1e38
    x[6, 3], x[7, 95], x[8, 0] = torch.nan, torch.inf, -torch.inf
    x[9] = torch.arange(100) * 0.5 - 20
    quantization = {
        "asymmetric": (None, None, False),
        "static": (torch.tensor(0.02), None, True),
        "static with a zero point": (torch.tensor(0.02), torch.tensor(-77, dtype=torch.int8), True),
    }[how]
    for dtype, columns in itertools.product(harness.DTYPES, (100, 96)[kernel == "wgmma128" :]):
        args = (x[:, :columns].to(dtype), weight[:, :columns].contiguous(), scales)
        y = harness.int8_linear(
            int8_library, *args, bias, "relu", *quantization, kernel=kernel, max_blocks=5
        )
        with backend("eager"):
            sums = args[1].sum(1, dtype=torch.int32)
            expected = int8_linear(*args, sums, bias, "relu", *quantization)
        assert_same(y, expected, "relu")
        assert y[6:9].isnan().all()


def test_choice_of_kernel(int8_library):
    names = {number: name for name, number in harness.INT8_LINEAR_KERNELS.items()}

    def choose(M: int, N: int, capability: int = 80) -> str:
        sizes = map(harness.c_int64, (M, N, 132))
        return names[int8_library.choose_int8_linear_kernel(*sizes, capability)]

    assert [choose(M, 4096) for M in (1, 2, 4, 5, 16)] == [
        *("rows1", "rows4", "rows4", "rows16", "rows16"),
    ]
    assert choose(17, 4096) == "tile64"
    assert choose(4096, 4096) == "tile128"
    assert choose(16, 4096, 90) == "rows16"
    assert choose(64, 4096, 90) == "tile64"
    assert [choose(4096, N, 90) for N in (768, 1024, 1056, 8192)] == [
        *("wgmma128", "wgmma128", "wgmma256", "wgmma256"),
    ]
    assert choose(4096, 8192, 100) == "tile128"


# -- huffman_decode -------------------------------------------------------------------------------

ALPHABETS = {
    "uniform": np.ones(256, np.int64),
    "skewed": (2.0 ** -np.arange(20) * 1e6).astype(np.int64),
    "normal": np.maximum(1e5 * np.exp(-(((np.arange(64) - 32) / 6.0) ** 2)), 0).astype(np.int64),
    "two": np.array([0, 5, 0, 3]),
    "one": np.array([0, 0, 9]),
}


def make_stream(name: str, n: int, chunk_size: int, seed: int = 0):
    counts = ALPHABETS[name]
    random = np.random.default_rng(seed)
    symbols = random.choice(len(counts), size=n, p=counts / counts.sum()).astype(np.uint8)
    lengths = lengths_for(counts)
    return symbols, lengths, *encode(symbols, lengths, chunk_size)


HUFFMAN_CASES = [
    *itertools.product(ALPHABETS, (1, 3, 50), (1, 7, 64)),
    *itertools.product(ALPHABETS, (1000,), (64, 300, 4096)),
    ("skewed", 20000, 4096),
    ("normal", 20000, 10000),
    ("uniform", 5000, 4096),
    ("one", 9000, 8000),
]


@pytest.mark.parametrize(("name", "n", "chunk_size"), HUFFMAN_CASES)
def test_huffman_decode(huffman_library, name, n, chunk_size):
    symbols, lengths, stream, offsets = make_stream(name, n, chunk_size)
    for shift, order in enumerate(ORDERS):
        moved = np.concatenate([np.zeros(shift, np.uint8), stream])[shift:]
        output, *status = harness.huffman_decode(
            huffman_library,
            *(moved, offsets, lengths, n, chunk_size),
            output_shift=3 - shift,
            order=order,
        )
        assert status == [0, None, 0]
        np.testing.assert_array_equal(output, symbols)


def test_huffman_decode_of_nothing(huffman_library):
    empty, zero = np.zeros(0, np.uint8), np.zeros(1, np.int64)
    for lengths in (empty, np.zeros(5, np.uint8), np.array([1, 1], np.uint8)):
        output, *status = harness.huffman_decode(huffman_library, empty, zero, lengths, 0, 8)
        assert (len(output), status) == (0, [0, None, 0])


TOO_LONG, KRAFT, NO_SYMBOLS, OFFSETS, SIZE, CHECKSUM, CODEC, OVERRUN, LEFTOVER, PADDING, NO_CODE = (
    range(1, 12)
)


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        ([1, 2], KRAFT),
        ([1, 1, 1], KRAFT),
        ([2], KRAFT),
        ([1] * 256, KRAFT),
        ([1, 13], TOO_LONG),
        ([255] * 256, TOO_LONG),
        ([0, 0], NO_SYMBOLS),
        ([], NO_SYMBOLS),
    ],
)
def test_huffman_lengths_that_are_no_code(huffman_library, lengths, error):
    stream, offsets = np.zeros(4, np.uint8), np.array([0, 4])
    output, *status = harness.huffman_decode(
        huffman_library, stream, offsets, np.array(lengths, np.uint8), 20, 64
    )
    assert status[0] == error
    assert (output == 0x5A).all()


@pytest.mark.parametrize(
    ("offsets", "chunk"),
    [
        ([1, 2, 4], 0),
        ([0, 2, 3], 0),
        ([0, 5, 4], 0),
        ([0, -1, 4], 0),
        ([0, 2**62, 4], 0),
        ([-(2**63), 2, 4], 0),
        ([0, 2, 2**63 - 1], 0),
    ],
)
def test_huffman_offsets_out_of_order(huffman_library, offsets, chunk):
    stream = np.zeros(4, np.uint8)
    _, table, bad, error = harness.huffman_decode(
        huffman_library, stream, np.array(offsets), np.array([1, 1], np.uint8), 32, 16
    )
    assert (table, bad, error) == (0, chunk, OFFSETS)


def test_huffman_single_faults(huffman_library):
    def decode(chunk, lengths, n):
        result = harness.huffman_decode(
            huffman_library, chunk, np.array([0, len(chunk)]), np.array(lengths, np.uint8), n, 64
        )
        return result[2:]

    assert decode(framed("1010"), [1, 1], 4) == (None, 0)
    assert decode(framed("10101"), [1, 1], 4) == (0, PADDING)
    assert decode(framed("10101010"), [1, 1], 9) == (0, SIZE)
    assert decode(framed("1010" + 12 * "0"), [1, 1], 8) == (0, LEFTOVER)
    assert decode(np.zeros(0, np.uint8), [1, 1], 1) == (0, SIZE)
    assert decode(np.zeros(4, np.uint8), [1, 1], 1) == (0, SIZE)
    assert decode(framed(24 * "0"), [1, 1], 9) == (0, LEFTOVER)
    assert decode(framed(128 * "0"), [1, 1], 9) == (0, SIZE)
    assert decode(framed("0010"), [1], 4) == (0, NO_CODE)
    assert decode(framed("0000"), [1], 4) == (None, 0)
    assert decode(framed("11111111"), [1, 3, 3, 3, 3], 3) == (0, OVERRUN)
    flipped = framed("1010")
    flipped[5] ^= 1
    assert decode(flipped, [1, 1], 4) == (0, CHECKSUM)
    other = framed("1010")
    other[4] = 1
    assert decode(seal(other), [1, 1], 4) == (0, CODEC)


@pytest.mark.parametrize("name", ["skewed", "normal", "two", "one"])
def test_huffman_corrupt_streams(huffman_library, name):
    """Random damage: the same verdict, chunk by chunk, as a decoder that reads bit after bit."""
    random = np.random.default_rng(7)
    n, chunk_size = 600, 128
    _, lengths, stream, offsets = make_stream(name, n, chunk_size)
    for trial in range(12):
        broken, bounds = stream.copy(), offsets.copy()
        if trial % 3 == 0:
            broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        elif trial % 3 == 1:  # with CRCs that fit
            for begin, end in itertools.pairwise(bounds):
                broken[random.integers(begin + 5, end)] ^= 1 << random.integers(8)
                broken[begin:end] = seal(broken[begin:end])
        else:
            inner = bounds[1:-1]
            inner += random.integers(-3, 4, len(inner))
            bounds[1:-1] = np.sort(np.clip(inner, 0, len(broken)))
        chunks = [
            decode_chunk(
                broken[bounds[c] : bounds[c + 1]], lengths, min(chunk_size, n - c * chunk_size)
            )
            for c in range(len(bounds) - 1)
        ]
        first_bad = next((c for c, symbols in enumerate(chunks) if symbols is None), None)
        output, table, bad, _ = harness.huffman_decode(
            *(huffman_library, broken, bounds, lengths, n, chunk_size),
            order=ORDERS[trial % len(ORDERS)],
        )
        assert (table, bad) == (0, first_bad)
        for c, symbols in enumerate(chunks):
            if symbols is not None:
                decoded = output[c * chunk_size : (c + 1) * chunk_size]
                np.testing.assert_array_equal(decoded, symbols)
