"""The Triton kernels, compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]

COMPILE = """
import json, re, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_kernels import (
    bsr, bsr_linear_grad_values, huffman_decode, int8_conv2d, int8_linear, merge_planes,
    packed_linear, quantize_images, quantize_rows, round_rows, winograd_conv2d)

kernels = set()

def build(capability, kernel, types, constants, multiples_of_16=(), **options):
    kernels.add((kernel.fn.__name__, capability))
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
        results[f"round {dtype} {capability}"] = build(
            capability, round_rows.round_rows_kernel,
            {"x": f"*{dtype}", "y": f"*{dtype}", "x_stride": "i64", "K": "i32"},
            {"LARGEST": 65504.0, "ASYMMETRIC": dtype != "fp32", "BLOCK_K": 64}, **exact)
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
    stream = {"stream": "*u8", "ones_before": "*i64", "starts": "*i64", "ranks": "*i64",
              "links": "*i32", "symbols": "*u8"}
    ones = dict.fromkeys(("nodes", "levels", "num_symbols", "chunk_size"), 1)
    for code, planes, coded, raw, begun, fixed in (
        ("u8", 1, 0, 0, False, {}), ("u8", 1, 0, 0, False, ones), ("i16", 2, 1, 1, False, {}),
        ("i32", 4, 3, 7, False, {}), ("i32", 4, 1, 0, True, {})
    ):
        types = {**stream, "output": f"*{code}", **{f"plane_{p}": "*u8" for p in range(4)},
                 "root": "i32", "nodes": "i32", "levels": "i32", "num_symbols": "i64",
                 "chunk_size": "i32"}
        types = {name: type_ for name, type_ in types.items() if name not in fixed}
        constants = {"PLANES": planes, "CODED": coded, "RAW": raw, "BEGUN": begun,
                     "TURNED": planes > 1, "BLOCK": 1 if fixed else 1024, **fixed}
        results[f"huffman {planes} {coded} {raw} {len(fixed)} {capability}"] = build(
            capability, huffman_decode.huffman_decode_kernel, types, constants, num_warps=4)
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
results["kernels"] = sorted(kernels)
print(json.dumps(results))
"""


KERNELS = sorted((ROOT / "triton_kernels").glob("*.py"))
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
    names = re.findall(r"^def (\w+_kernel)\(", "".join(map(Path.read_text, KERNELS)), re.MULTILINE)
    assert results.pop("kernels") == sorted([name, arch] for name in names for arch in (80, 90))
    for name, built in results.items():
        assert built["cubin"] > 0
        assert built["shared"] <= 163 * 1024  # what a block may take on sm_80
        halves = [f"{kind} {dtype}" for kind in ("packed", "winograd multiply") for dtype in HALVES]
        halves += [f"bsr {kind}{dtype}" for kind in ("", "values ") for dtype in HALVES]
        if name.startswith(("matmul", "packed i8", "bsr i8", "conv 3", "conv 5", *halves)):
            assert built["matrix"], f"{name}: no tensor-core instruction"
