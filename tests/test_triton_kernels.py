"""The Triton kernels: in the interpreter, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
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


COMPILE = """
import json, re, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_kernels import (
    bsr, bsr_linear_grad_values, huffman_decode, int8_conv2d, int8_linear, merge_planes,
    packed_linear, quantize_images, quantize_rows, winograd_conv2d)

def build(capability, kernel, types, constants, multiples_of_16=(), **options):
    signature = dict(types) | dict.fromkeys(constants, "constexpr")
    places = [p.name for p in kernel.params]
    attributes = {(places.index(n),): [["tt.divisibility", 16]] for n in multiples_of_16}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    instructions = re.findall(r"wgmma\\.mma_async|mma\\.sync", built.asm["ptx"])
    return {"cubin": len(built.asm["cubin"]), "matrix": sorted(set(instructions)),
            "shared": built.metadata.shared}

results = {}
for capability in (80, 90):
    exact = {"enable_fp_fusion": False}
    for dtype in ("fp32", "fp16", "bf16"):
        results[f"quantize {dtype} {capability}"] = build(
            capability, quantize_rows.quantize_rows_kernel,
            {"x": f"*{dtype}", "q": "*i8", "x_scales": "*fp32", "x_zeros": "*i32",
             "x_scale": "*fp32", "x_zero": "*i8", "x_stride": "i64", "K": "i32"},
            {"STATIC": dtype == "fp16", "ASYMMETRIC": dtype == "bf16",
             "HAS_ZERO": dtype == "fp16", "BLOCK_K": 1024}, **exact)
    names = ("q", "weight", "x_scales", "x_zeros", "weight_scales", "weight_sums", "bias", "y",
             "M", "N", "K")
    for M, dtype in ((1, "bf16"), (16, "fp32"), (256, "fp16"), (4096, "bf16")):
        types = dict(zip(names, ("*i8", "*i8", "*fp32", "*i32", "*fp32", "*i32", "*fp32",
                                 f"*{dtype}", *["i32"] * 3)))
        constants = int8_linear.block_sizes(M, 4096)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")} | exact
        constants |= {"HAS_ZEROS": M == 256, "HAS_BIAS": M > 16, "ACTIVATION": 2, "GROUP_M": 8}
        if M == 1:  # Triton makes a constant of an integer argument that is 1
            del types["M"]
            constants["M"] = 1
        results[f"matmul {M} {dtype} {capability}"] = build(
            capability, int8_linear.int8_linear_kernel, types, constants, **options)
    image = {"x": None, "ranges": "*fp32", "q": "*i8", "x_scales": "*fp32", "x_zeros": "*i32",
             "x_scale": "*fp32", "x_zero": "*i8"}
    names = ("stride_n", "stride_c", "stride_p", "pixels", "channels", "slots", "pixel_slots")
    for dtype, static, asymmetric in (("fp32", 0, 0), ("fp16", 1, 0), ("bf16", 0, 1)):
        places = {"x": f"*{dtype}", "ranges": "*fp32"}
        places |= dict.fromkeys(("stride_n", "elements", "parts", "span"), "i32")
        results[f"ranges {dtype} {capability}"] = build(
            capability, quantize_images.image_ranges_kernel, places, {"BLOCK": 4096}, **exact)
        types = image | {"x": f"*{dtype}"} | dict.fromkeys((*names, "parts"), "i32")
        results[f"quantize images {dtype} {capability}"] = build(
            capability, quantize_images.quantize_images_kernel, types,
            {"STATIC": bool(static), "ASYMMETRIC": bool(asymmetric), "HAS_ZERO": bool(static),
             "PARTS": 16, "BLOCK_P": 64, "BLOCK_C": 32}, **exact)
    pointers = {"q": "*i8", "weight": "*i8", "x_scales": "*fp32", "x_zeros": "*i32",
                "weight_scales": "*fp32", "weight_sums": "*i32", "bias": "*fp32"}
    places = ("H", "W", "OH", "OW", "area", "R", "S", "stride_h", "stride_w", "padding_h",
              "padding_w", "dilation_h", "dilation_w")
    for M, K, slots, dtype in ((3136, 64, 16, "fp32"), (3136, 128, 64, "bf16"),
                               (50176, 256, 256, "fp16")):
        constants = int8_conv2d.block_sizes(M, K, slots)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")} | exact
        types = pointers | {"y": f"*{dtype}"}
        types |= dict.fromkeys(("M", "K", "groups", "slots", *places), "i32")
        results[f"conv {M} {dtype} {capability}"] = build(
            capability, int8_conv2d.int8_conv2d_kernel, types, constants | {
                "LAST": M > 3136, "HAS_BIAS": True, "ACTIVATION": 2, "GROUP_M": 8},
            ("q", "weight", "slots"), **options)
    for depth, dtype in ((1, "bf16"), (4, "fp32")):
        types = pointers | {"y": f"*{dtype}"}
        types |= dict.fromkeys(("M", "K", "groups", "C", "pixel_slots", *places), "i32")
        constants = {"DEPTH": depth, "LAST": depth == 1, "HAS_BIAS": True, "ACTIVATION": 1,
                     "BLOCK_M": 32, "BLOCK_N": 32}
        if depth == 1:  # Triton makes constants of them
            types = {name: type_ for name, type_ in types.items() if name not in ("K", "C")}
            constants |= {"K": 1, "C": 1}
        results[f"conv of few {depth} {capability}"] = build(
            capability, int8_conv2d.int8_conv2d_few_kernel, types, constants, **exact)
    pointers = {"weight": "*u8", "x_scales": "*fp32", "scales": "*fp32", "zeros": "*u8"}
    sizes = ("M", "N", "K", "x_stride", "group_size", "groups", "steps")
    for M, bits, x, y, group in (
        (1, 4, "i8", "bf16", 128), (1, 4, "bf16", "bf16", 128), (1, 2, "i8", "fp32", 4096),
        (16, 4, "fp16", "fp16", 64), (64, 4, "fp32", "fp32", 16), (64, 2, "i8", "fp16", 48),
        (4096, 4, "fp16", "fp16", 128), (4096, 4, "i8", "bf16", 256), (4096, 2, "i8", "bf16", 4096)
    ):
        dtypes = {"i8": "int8", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        groups = -(-4096 // group)
        span = packed_linear.span_of(group, groups)
        constants = packed_linear.block_sizes(M, 4096, getattr(torch, dtypes[x]), span)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        types = {"x": f"*{x}", **pointers, "bias": "*fp32", "y": f"*{y}"}
        types |= dict.fromkeys(sizes, "i32")
        integers = {"M": M, "groups": groups, "steps": -(-span // constants["BLOCK_K"])}
        constants |= {name: 1 for name in integers if integers[name] == 1}
        constants |= {
            "BITS": bits, "ZERO": 8 if bits == 4 else 1, "HAS_ZEROS": bits == 4,
            "ALIGNED": group % constants["BLOCK_K"] == 0, "ONE_GROUP": group == 4096,
            "UPCAST": False, "HAS_BIAS": True, "ACTIVATION": 2, "GROUP_M": 8}
        types = {name: type_ for name, type_ in types.items() if name not in constants}
        multiples = [name for name in types if name not in ("M", "groups", "steps")]
        results[f"packed {x} {M} {bits} {group} {capability}"] = build(
            capability, packed_linear.packed_linear_kernel, types, constants, multiples, **options)
    vectors = {"starts": "*i32", "inputs": "*i32", "order": "*i64", "x_scales": "*fp32",
               "x_zeros": "*i32", "scales": "*fp32", "weight_sums": "*i32", "bias": "*fp32"}
    images = bsr.Windows("i32", *(("i32",) * count for count in (2, 4, 2, 2, 2, 2, 2)))
    for M, x, w, y, (r, c), kind in (
        (16, "bf16", "bf16", "bf16", (64, 64), 0), (4096, "bf16", "bf16", "bf16", (128, 128), 0),
        (4096, "fp16", "fp16", "fp16", (16, 16), 1), (256, "fp32", "bf16", "fp32", (32, 32), 0),
        (4096, "bf16", "bf16", "bf16", (16, 1), 0), (256, "fp16", "fp16", "fp16", (1, 16), 1),
        (16, "i8", "i8", "bf16", (32, 32), 0), (4096, "i8", "i8", "fp16", (16, 16), 0),
        (4096, "bf16", "bf16", "bf16", (64, 64), 2), (4096, "fp16", "fp16", "fp16", (16, 1), 2)
    ):
        dtype = {"i8": torch.int8, "fp32": torch.float32}.get(x, torch.float16)
        constants = bsr.block_sizes(M, 4096, dtype, *((c, r) if kind == 1 else (r, c)))
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        constants |= {"R": r, "C": c, "TRANSPOSED": kind == 1, "UPCAST": x != w,
                      "HAS_ZEROS": M == 16, "HAS_BIAS": True, "ACTIVATION": 2, "GROUP_M": 8}
        types = {"x": f"*{x}", "values": f"*{w}", **vectors, "y": f"*{y}"}
        types |= dict.fromkeys(("M", "N", "K", "x_stride", "rows", "nnz"), "i32")
        (types if kind == 2 else constants)["windows"] = images if kind == 2 else None
        results[f"bsr {x} {w} {M} {r} {c} {kind} {capability}"] = build(
            capability, bsr.bsr_multiply_kernel, types, constants,
            ("x", "values", "y", "N", "K", "x_stride"), **options)
    types = {"block_rows": "*i32", "col_indices": "*i32", "result": "*fp32"}
    types |= dict.fromkeys(("M", "N", "K", "grad_stride", "x_stride"), "i32")
    for x, dtype, block in (("bf16", torch.bfloat16, (64, 64)), ("fp16", torch.float16, (128, 16)),
                            ("fp32", torch.float32, (32, 32)), ("bf16", torch.bfloat16, (16, 1))):
        constants = bsr_linear_grad_values.block_sizes(dtype, block)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        constants |= {"R": block[0], "C": block[1], "UPCAST": False}
        results[f"bsr values {x} {block} {capability}"] = build(
            capability, bsr_linear_grad_values.bsr_grad_values_kernel,
            {"grad": f"*{x}", "x": f"*{x}", **types}, constants,
            ("grad", "x", "result", "N", "K", "grad_stride", "x_stride"), **options)
    types = {"stream": "*u8", "ones_before": "*i64", "starts": "*i64", "ranks": "*i64",
             "children": "*i32", "output": "*u8", "nodes": "i32", "levels": "i32",
             "num_symbols": "i64", "chunk_size": "i32"}
    results[f"huffman {capability}"] = build(
        capability, huffman_decode.huffman_decode_kernel, types, {"BLOCK": 1024}, num_warps=4)
    ones = dict.fromkeys(("nodes", "levels", "num_symbols", "chunk_size"), 1)
    types = {name: type_ for name, type_ in types.items() if name not in ones}
    results[f"huffman of one symbol {capability}"] = build(
        capability, huffman_decode.huffman_decode_kernel, types, {"BLOCK": 1, **ones},
        num_warps=4)
    types = {"stream": "*u8", "offsets": "*i64", "table": "*i32", "powers": "*i32",
             "crcs": "*i32"}
    for segment_bytes in (1, 64):
        results[f"huffman crc {segment_bytes} {capability}"] = build(
            capability, huffman_decode.crc_kernel, types,
            {"SEGMENTS": 1024, "SEGMENT_BYTES": segment_bytes}, num_warps=8)
    for planes, code in ((2, "i16"), (4, "i32")):
        results[f"merge {planes} planes {capability}"] = build(
            capability, merge_planes.merge_planes_kernel,
            {"out": f"*{code}", **{f"plane_{p}": "*u8" for p in range(4)}, "count": "i64"},
            {"PLANES": planes, "TURNED": True, "BLOCK": merge_planes.BLOCK}, num_warps=4)
    for dtype, alpha_h, alpha_w, tile in (
        ("fp32", 8, 8, 6), ("fp16", 6, 6, 4), ("bf16", 4, 4, 2), ("fp16", 1, 8, 4)
    ):
        tiles = {"ALPHA_H": alpha_h, "ALPHA_W": alpha_w, "TILE_H": tile if alpha_h > 1 else 1,
                 "TILE_W": tile}
        block_t, block_c = winograd_conv2d.transform_blocks(alpha_h * alpha_w, 256)
        strides = [f"stride_{name}" for name in "nchw"]
        place = ("tile_rows", "tile_columns", "first_tile", "tiles")
        sizes = dict.fromkeys((*strides, "H", "W", "padding_h", "padding_w", *place, "C"), "i32")
        name = f"{dtype} {alpha_h} {alpha_w} {capability}"
        results[f"winograd input {name}"] = build(
            capability, winograd_conv2d.winograd_input_kernel,
            {"x": f"*{dtype}", "v": f"*{dtype}"} | sizes,
            tiles | {"BLOCK_T": block_t, "BLOCK_C": block_c})
        sizes = dict.fromkeys((*strides, "OH", "OW", *place, "K"), "i32")
        results[f"winograd output {name}"] = build(
            capability, winograd_conv2d.winograd_output_kernel,
            {"m": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}"} | sizes,
            tiles | {"HAS_BIAS": True, "ACTIVATION": 2, "BLOCK_T": block_t, "BLOCK_K": block_c})
    for dtype, size in (("fp32", 4096), ("fp16", 4096), ("bf16", 64)):
        constants = winograd_conv2d.block_sizes(size, size, getattr(torch, {"fp32": "float32",
            "fp16": "float16", "bf16": "bfloat16"}[dtype]))
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        types = {"v": f"*{dtype}", "u": f"*{dtype}", "m": "*fp32"}
        types |= dict.fromkeys(("tiles", "C", "K", "groups"), "i32")
        results[f"winograd multiply {dtype} {capability}"] = build(
            capability, winograd_conv2d.winograd_multiply_kernel, types,
            constants | {"UPCAST": False}, **options)
results["touched CUDA"] = torch.cuda.is_initialized()
print(json.dumps(results))
"""


HALVES = ("fp16", "bf16")


def test_compiles_ahead_of_time():
    """In a process of its own: this one interprets. It runs no driver, so it needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.pop("touched CUDA") is False
    assert len(results) == 2 * (3 + 4 + 6 + 5 + 9 + 14 + 4 + 4 * 2 + 3 + 2)
    for name, built in results.items():
        assert built["cubin"] > 0
        assert built["shared"] <= 163 * 1024  # what a block may take on sm_80
        halves = [f"{kind} {dtype}" for kind in ("packed", "winograd multiply") for dtype in HALVES]
        halves += [f"bsr {kind}{dtype}" for kind in ("", "values ") for dtype in HALVES]
        if name.startswith(("matmul", "packed i8", "bsr i8", "conv 3", "conv 5", *halves)):
            assert built["matrix"], f"{name}: no tensor-core instruction"
