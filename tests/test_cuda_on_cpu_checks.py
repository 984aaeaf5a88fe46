"""What runs the CUDA kernels on a CPU finds the mistakes that it is there for."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import harness
from cuda_on_cpu.harness import KernelError, Plant
from test_cuda_on_cpu import make_stream, reference
from test_cuda_on_cpu_winograd import Case, make
from test_cuda_on_cpu_winograd import run as run_winograd
from test_int8_conv2d import Case as Case8
from test_int8_conv2d import make as make_conv8

from compressops import backend
from compressops.ops.int8_conv2d import int8_conv2d, pack_as

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")
ALL_ORDERS = pytest.mark.parametrize("order", harness.ORDERS)


@pytest.fixture(scope="module", params=["switch", "ucontext"])
def selftest(request):
    return harness.build(
        "selftest", defines=("CUDA_ON_CPU_UCONTEXT",) * (request.param != "switch")
    )


def run(library: ctypes.CDLL, name: str, order: str) -> np.ndarray:
    out = np.zeros(66, np.int64)
    aligned = out[out.ctypes.data % 16 // 8 :]
    pointer = ctypes.c_void_p(aligned.ctypes.data)
    harness._call(library.run_selftest, name.encode(), pointer, order=order)
    return aligned


@ALL_ORDERS
def test_sound_kernels(selftest, order):
    ids = np.arange(64)
    assert run(selftest, "warp_operations", order)[:64].all()
    assert run(selftest, "arithmetic", order)[:7].tolist() == [
        *(127 * 2 - 128 * 3 - 4 + 5 + 100, 0x77440011, 8 * 100 + 4 * 10 + 16),
        *(0x6789ABCD, 0x23456789, 1, 240),
    ]
    assert run(selftest, "atomics", order)[:5].tolist() == [2016, 1000, 63, 255, 5]
    assert (run(selftest, "two barriers a round", order)[:64] == (ids + 33) % 64 + 1).all()
    assert (run(selftest, "syncwarp", order)[:64] == ids ^ 1).all()
    assert (run(selftest, "copy waited for", order)[:64] == 0).all()


@ALL_ORDERS
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one barrier a round", r'race on shared array "values".* thread \d+ (read|wrote)'),
        ("no barrier", r'race on shared array "values"|never written'),
        ("no syncwarp", r'race on shared array "values"|never written'),
        ("syncwarp across warps", r'race on shared array "values"|never written'),
        ("past a shared array", r'shared array "values": bytes 256 to 260 are out of bounds'),
        ("past a slice", r"out of bounds \[0, 128\)"),
        ("unwritten shared", "thread 0: reads .* byte 0, never written"),
        ("misaligned shared", "byte 2 is misaligned for an access of 4"),
        ("misaligned global", "byte 8 is misaligned for an access of 16"),
        ("past global", 'thread 63: global array "out": bytes 512 to 520 are out of bounds'),
        ("too little dynamic shared", "wants 68 bytes .* the launch gave 64"),
        ("divergent barrier", "divergent __syncthreads.* has exited"),
        ("two barriers", r"divergent __syncthreads: .* at line \d+ .* at line \d+"),
        ("barrier against shuffle", "divergent __syncthreads: .* waits in __shfl_sync"),
        (
            "lanes that never come",
            "deadlock; .*lanes ffff wait in __shfl_sync for lanes ffff0000|exited",
        ),
        ("lane outside mask", "reads lane 20, which is not in its mask"),
        ("mask without caller", "lacks the calling lane"),
        ("exited lane in mask", "lane 3, which has exited"),
        ("copy not waited for", "before its cp.async is waited for"),
    ],
)
def test_mistakes_are_found(selftest, name, message, order):
    with pytest.raises(KernelError, match=message):
        run(selftest, name, order)


def test_half_types_are_those_of_torch(selftest):
    def convert(function, source, dtype):
        result = torch.empty(source.shape, dtype=dtype)
        size = ctypes.c_int64(source.numel())
        function(harness._pointer(source), harness._pointer(result), size)
        return result

    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    floats = convert(selftest.half_to_float, halves, torch.float32)
    assert torch.equal(floats.nan_to_num(1e9), halves.float().nan_to_num(1e9))
    sample = torch.randint(-(2**31), 2**31, (20000,)).to(torch.int32).view(torch.float32)
    between = (floats[:-1] + floats[1:]) / 2  # ties
    for values in (floats, between, torch.randn(1000), sample, torch.tensor([65519.9, 65520.0])):
        for function, dtype in (
            (selftest.float_to_half, torch.float16),
            (selftest.float_to_bfloat16, torch.bfloat16),
        ):
            actual, expected = convert(function, values, dtype), values.to(dtype)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# -- mistakes planted in the real kernels ---------------------------------------------------------

QUANTIZE, INT8, HUFFMAN = "quantize_rows.cuh", "int8_linear.cuh", "huffman_decode.cuh"
TILE, CONV8, IMAGES = "int8_tile.cuh", "int8_conv2d.cuh", "quantize_images.cuh"
INT8_PLANTS = {
    "off by one": (
        Plant(INT8, "m < args.M && k < padded_k", "m <= args.M && k < padded_k"),
        'global array "q".* out of bounds',
    ),
    "missing __syncthreads": (
        Plant(TILE, "__syncthreads();  // everyone's copies", "// everyone's copies"),
        'race on shared array "shared"|never written|before its cp.async',
    ),
    "missing __syncthreads between rows": (
        Plant(QUANTIZE, "__syncthreads();  // the next row", "// the next row"),
        'race on shared array "warp_bits"',
    ),
    "out-of-bounds shared write": (
        Plant("tiles.cuh", "return row * 4 +", "return (row + 1) * 4 +"),
        'shared array "shared".* out of bounds',
    ),
    "wait that ends too early": (
        Plant(TILE, "cp_async_wait<Tile::kStages - 2>", "cp_async_wait<Tile::kStages - 1>"),
        "before its cp.async is waited for",
    ),
    "wrong fragment": (
        Plant(TILE, "chunk + lane / 8 % 2", "chunk + lane / 16 % 2"),
        "wrong result",
    ),
    "shuffle over half a warp": (
        Plant("warp.cuh", "int lanes = kLanes / 2;", "int lanes = kLanes / 4;"),
        "wrong result",
    ),
}
CONV8_PLANTS = {
    "off by one": (
        Plant(CONV8, "row < shape.H &&", "row <= shape.H &&"),
        'global array "q".* out of bounds|wrong result',
    ),
    "a tap too many": (
        Plant(CONV8, "if (++s == shape.S)", "if (++s > shape.S)"),
        'global array "weight".* out of bounds',
    ),
    "another group's codes": (
        Plant(CONV8, "group_bytes = group * chunks * 16", "group_bytes = group * 16"),
        "wrong result",
    ),
    "padding of zeros": (
        Plant(IMAGES, "quantize_word(values, word, how)", "pixel < codes.pixels ? 1u : 0u"),
        "wrong result",
    ),
    "the range of a part": (
        Plant(IMAGES, "int64_t part = lane; part < args.parts", "int64_t part = lane; part < 1"),
        "wrong result",
    ),
    "an output channel too many": (
        Plant(CONV8, "        if (k < shape.K) int8", "        int8"),
        "out of bounds|wrong result",
    ),
}
HUFFMAN_PLANTS = {
    "off by one": (
        Plant(HUFFMAN, "const int words = bytes / 8 + 2;", "const int words = bytes / 8;"),
        'shared array "dynamic".* never written|wrong result',
    ),
    "off by one in the output": (
        Plant(HUFFMAN, "min(16, count - first)", "16"),
        'global array "output".* out of bounds',
    ),
    "missing __syncthreads": (
        Plant(HUFFMAN, "  __syncthreads();\n\n  // Each thread counts", "  // Each thread counts"),
        "race on shared array|never written",
    ),
    "missing __syncthreads between levels": (
        Plant(HUFFMAN, "level_bits;\n    __syncthreads();", "level_bits;"),
        "race on shared array|never written",
    ),
    "wrong power": (
        Plant(HUFFMAN, "kHuffmanPowers + behind]", "kHuffmanPowers + behind + 1]"),
        "wrong result",
    ),
    "a number's bits taken for one": (
        Plant(HUFFMAN, "node.start + place * width", "node.start + place"),
        "wrong result",
    ),
    "wrong place": (
        Plant(HUFFMAN, "is_one ? ones : place - ones", "is_one ? ones : place"),
        "wrong result|out of bounds|never written",
    ),
}
PIXELS, CHUNK, PRODUCT, FUSED = (
    f"winograd_conv2d_{part}.cuh" for part in ("pixels", "chunk", "gemm", "fused")
)
WINOGRAD_PLANTS = {
    "off by one": (
        Plant(PIXELS, "h0 + i < shape.H)", "h0 + i <= shape.H)"),
        'global array "x".* out of bounds',
    ),
    "missing __syncthreads": (
        Plant(FUSED, "__syncthreads();  // everyone's U and V", "// everyone's U and V"),
        'race on shared array "shared"|never written|before its cp.async',
    ),
    "missing __syncthreads between rows": (
        Plant(CHUNK, "__syncthreads();  // the next row", "// the next row"),
        'race on shared array "staged"',
    ),
    "out-of-bounds shared write": (
        Plant(FUSED, "return row * 2 | (", "return (row + 1) * 2 | ("),
        'shared array "shared".* out of bounds',
    ),
    "wrong scale": (
        Plant(PRODUCT, "(exponent - 14u) << 23", "(exponent - 13u) << 23"),
        "wrong result",
    ),
    "rows that are not there": (
        Plant(PRODUCT, "if (row < chunk.rows && column < 2", "if (column < 2"),
        'global array "scratch".* out of bounds|wrong result',
    ),
}


@pytest.fixture(scope="module")
def planted():
    """All of them, built two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {
            (op, name): pool.submit(harness.build, op, plant, defines)
            for op, plants, defines in (
                ("int8_linear", INT8_PLANTS, ("CUDA_ON_CPU_FLOAT_ONLY",)),
                ("int8_conv2d", CONV8_PLANTS, ("CUDA_ON_CPU_FLOAT_ONLY",)),
                ("huffman_decode", HUFFMAN_PLANTS, ()),
                ("winograd_conv2d", WINOGRAD_PLANTS, ("CUDA_ON_CPU_HALF_ONLY",)),
            )
            for name, (plant, _) in plants.items()
        }
        return {key: future.result() for key, future in futures.items()}


def verdict(check) -> str:
    """What the checker says of a kernel, or how its result compares."""
    try:
        return "right result" if check() else "wrong result"
    except KernelError as error:
        return str(error)


@ALL_ORDERS
@pytest.mark.parametrize("name", INT8_PLANTS)
def test_mistakes_planted_in_int8_linear_are_found(planted, name, order):
    x, weight = torch.randn(66, 336), torch.randint(-128, 128, (70, 336), dtype=torch.int8)
    scales = torch.rand(70)
    expected = reference(x, weight, scales, None, "none")

    def check() -> bool:
        library = planted["int8_linear", name]
        y = harness.int8_linear(
            library, x, weight, scales, kernel="tile64", max_blocks=3, order=order
        )
        return torch.equal(y, expected)

    message = INT8_PLANTS[name][1]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(verdict(check))


@ALL_ORDERS
@pytest.mark.parametrize("name", CONV8_PLANTS)
def test_mistakes_planted_in_int8_conv2d_are_found(planted, name, order):
    """Two images of more than one part each, two groups, and a zero point."""
    case = Case8(n=2, c=34, h=25, w=24, k=18, stride=(3, 3), groups=2)
    x, weight, *rest = make_conv8(case, torch.device("cpu"))
    args = (x + 1, weight, *rest, None, None, False)
    packed = pack_as(weight, 2, 1, 16)
    with backend("eager"):
        expected = int8_conv2d(*args)

    def check() -> bool:
        library = planted["int8_conv2d", name]
        y = harness.int8_conv2d(library, *args[:2], packed, *args[2:], order=order)
        return torch.equal(y, expected)

    with pytest.raises(AssertionError, match=CONV8_PLANTS[name][1]):
        raise AssertionError(verdict(check))


@ALL_ORDERS
@pytest.mark.parametrize("name", HUFFMAN_PLANTS)
def test_mistakes_planted_in_huffman_decode_are_found(planted, name, order):
    n, chunk_size = 3001, 3001
    symbols, lengths, stream, offsets = make_stream("normal", n, chunk_size)

    def check() -> bool:
        library = planted["huffman_decode", name]
        result = harness.huffman_decode(
            library, stream, offsets, lengths, n, chunk_size, order=order
        )
        return np.array_equal(result[0], symbols) and result[1:] == (0, None, 0)

    message = HUFFMAN_PLANTS[name][1]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(verdict(check))


@ALL_ORDERS
@pytest.mark.parametrize("name", WINOGRAD_PLANTS)
def test_mistakes_planted_in_winograd_conv2d_are_found(planted, name, order):
    """With tiles of 2 the fused kernel, with tiles of 4 the chunked ones."""

    def check() -> bool:
        for tile in (2, 4):
            case = Case(1, 18, 5, 6, 13, tile, dtype=torch.float16)
            x, weight, bias = make(case)
            y = run_winograd(planted["winograd_conv2d", name], case, x, weight, bias, order)
            expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
            if (y.double() - expected).abs().max() > 0.1:
                return False
        return True

    message = WINOGRAD_PLANTS[name][1]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(verdict(check))
