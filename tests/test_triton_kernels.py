"""The Triton kernels: in the interpreter, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import numpy as np
import pytest
import torch
from cuda_on_cpu.huffman_streams import decode_chunk, framed, seal
from test_cuda_on_cpu import ALPHABETS, Case, assert_same, make, make_stream, reference

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def load(op: str):
    """The module of this source tree, whatever is installed, in a package of another name."""
    package = importlib.util.spec_from_file_location(
        "triton_under_test",
        ROOT / "triton_kernels" / "__init__.py",
        submodule_search_locations=[str(ROOT / "triton_kernels")],
    )
    sys.modules.setdefault("triton_under_test", importlib.util.module_from_spec(package))
    return importlib.import_module(f"triton_under_test.{op}")


@pytest.fixture(scope="module")
def int8_linear():
    module = load("int8_linear")

    def call(x, weight, scales, bias=None, activation="none"):
        sums = torch.zeros(scales.shape, dtype=torch.int32)  # not used here
        return module.int8_linear(x, weight, scales, sums, bias, activation)

    return call


@pytest.fixture(scope="module")
def huffman_decode():
    return load("huffman_decode").huffman_decode


needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
    reason="needs TRITON_INTERPRET=1 or a GPU",
)


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    [
        *(Case(M, N, K) for M, N, K in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (17, 64, 129))),
        *(Case(M, 65, 16, bias=False) for M in (7, 16, 129)),
        *(
            Case(5, 18, 80, dtype, activation=activation)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
            for activation in ("none", "relu", "gelu")
        ),
        Case(2, 3, 5000),
    ],
    ids=str,
)
def test_int8_linear(int8_linear, case):
    args = make(case)
    assert_same(
        int8_linear(*args, case.activation), reference(*args, case.activation), case.activation
    )


# 127 / amax overflows where a row is that small, as it may.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@needs_interpreter
def test_int8_linear_of_strided_batches_and_special_values(int8_linear):
    x, weight, scales, bias = make(Case(12, 5, 20))
    x[0, 3], x[1, 19], x[2] = torch.nan, -torch.inf, 0
    x[3] *= 1e-38
    x[4] = torch.arange(20) - 10 + 0.5
    x[4, 0] = 127
    expected = reference(x, weight, scales, bias, "relu")
    assert_same(int8_linear(x, weight, scales, bias, "relu"), expected, "relu")
    strided = x.T.contiguous().T.reshape(3, 2, 2, 20).transpose(0, 2)
    y = int8_linear(strided, weight.T.contiguous().T, scales, bias, "relu")
    assert_same(y.transpose(0, 2).reshape(12, 5), expected, "relu")


@pytest.mark.parametrize(
    ("weight_shape", "activation", "message"),
    [
        ((2, 5, 16, 4), "none", r"'weight' must be int8 \[5, 20\].* shape \[2, 5, 16, 4\]"),
        ((5, 20), "tanh", "'activation' must be one of .* got 'tanh'"),
    ],
)
def test_int8_linear_refuses(int8_linear, weight_shape, activation, message):
    weight = torch.zeros(weight_shape, dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        int8_linear(torch.zeros(2, 20), weight, torch.ones(5), None, activation)


@needs_interpreter
def test_int8_linear_on_a_packed_weight(int8_linear):
    x, weight, scales, bias = make(Case(3, 21, 10))
    padded = torch.nn.functional.pad(weight, (0, 2, 0, 11))
    packed = padded.view(2, 16, 3, 4).transpose(1, 2).contiguous()
    assert torch.equal(int8_linear(x, packed, scales, bias), int8_linear(x, weight, scales, bias))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_steps_of_packed_linear_hold_every_group_and_little_else(dtype):
    module = load("packed_linear")
    for M in (1, 64, 4096):
        for group in (*range(16, 1040, 16), 4096):
            span = module.span_of(group, groups=9)
            block = module.block_sizes(M, 4096, dtype, span)["BLOCK_K"]
            inputs = -(-span // block) * block
            assert block % 64 == 0
            assert inputs <= -(-span // 64) * 64 * 9 / 8
            assert all(group * i % 64 + group <= inputs for i in range(9))


@needs_interpreter
@pytest.mark.parametrize("name", ALPHABETS)
@pytest.mark.parametrize(("n", "chunk_size"), [(1, 1), (50, 7), (2000, 64), (300, 300)])
def test_huffman_decode(huffman_decode, name, n, chunk_size):
    symbols, lengths, stream, offsets = make_stream(name, n, chunk_size)
    arguments = map(torch.from_numpy, (stream, offsets, lengths))
    np.testing.assert_array_equal(huffman_decode(*arguments, n, chunk_size).numpy(), symbols)


@needs_interpreter
def test_huffman_decode_of_corrupt_streams(huffman_decode):
    random = np.random.default_rng(3)
    n, chunk_size = 200, 64
    _, lengths, stream, offsets = make_stream("normal", n, chunk_size)
    for trial in range(12):
        broken = stream.copy()
        if trial % 2:
            broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        else:  # with CRCs that fit
            for begin, end in itertools.pairwise(offsets):
                broken[random.integers(begin + 5, end)] ^= 1 << random.integers(8)
                broken[begin:end] = seal(broken[begin:end])
        chunks = [
            decode_chunk(
                broken[offsets[c] : offsets[c + 1]], lengths, min(chunk_size, n - c * chunk_size)
            )
            for c in range(len(offsets) - 1)
        ]
        arguments = [*map(torch.from_numpy, (broken, offsets, lengths)), n, chunk_size]
        bad = [c for c, symbols in enumerate(chunks) if symbols is None]
        if bad:
            with pytest.raises(ValueError, match=f"got chunk {bad[0]}: "):
                huffman_decode(*arguments)
        else:
            np.testing.assert_array_equal(huffman_decode(*arguments), np.concatenate(chunks))


@needs_interpreter
@pytest.mark.parametrize(
    ("chunks", "offsets", "lengths", "n", "message"),
    [
        (["0"], None, [1, 13], 4, "'lengths' must be code lengths of at most 12 bits, got 13"),
        (["0"], None, [1, 2], 4, "'lengths' must be a complete prefix code .* got 3072"),
        (["0"], [0, 7], [1, 1], 4, r"'offsets' must be from 0 to the stream's 6 bytes, got \[0, 7"),
        (["0", "0"], [0, 19, 12], [1, 1], 17, "'offsets' must be non-decreasing, got chunk 0: off"),
        (["0"], None, [1, 1], 9, "chunk 0: it is shorter or longer"),
        ([16 * "0"], None, [1, 1], 8, "chunk 0: whole bytes are left over"),
        (["00001111"], None, [1, 1], 4, "chunk 0: the bits after the last code"),
        (["0010"], None, [1], 4, "chunk 0: it holds bits that are no code"),
        ([8 * "1"], None, [1, 2, 2], 5, "chunk 0: its codes run past"),
    ],
)
def test_huffman_decode_refuses(huffman_decode, chunks, offsets, lengths, n, message):
    chunks = list(map(framed, chunks))
    offsets = torch.tensor(offsets or [0, *itertools.accumulate(map(len, chunks))])
    stream = torch.from_numpy(np.concatenate(chunks))
    with pytest.raises(ValueError, match=message):
        huffman_decode(stream, offsets, torch.tensor(lengths).byte(), n, 16)
