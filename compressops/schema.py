"""Every op's schema: the one list.

The ops are defined here, in Python, so that they exist (and `torch.compile` knows them) where no
compiled library does. Adding an op is one line here and one set of siblings named like it.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "int8_linear": (
        "(Tensor x, Tensor weight, Tensor weight_scales, Tensor weight_sums, "
        "Tensor? bias=None, str activation='none', Tensor? x_scale=None, Tensor? x_zero=None, "
        "bool symmetric=True) -> Tensor"
    ),
    "int8_conv2d": (
        "(Tensor x, Tensor weight, Tensor weight_scales, Tensor weight_sums, "
        "Tensor? bias=None, int[] stride=[1, 1], int[] padding=[0, 0], int[] dilation=[1, 1], "
        "int groups=1, str activation='none', Tensor? x_scale=None, Tensor? x_zero=None, "
        "bool symmetric=True) -> Tensor"
    ),
    "int4_linear": (
        "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, int out_features, "
        "int? group_size=None, Tensor? bias=None, str activation='none', "
        "bool quantize_x=True) -> Tensor"
    ),
    "ternary_linear": (
        "(Tensor x, Tensor weight, Tensor scales, int out_features, int? group_size=None, "
        "Tensor? bias=None, str activation='none') -> Tensor"
    ),
    "round_rows": "(Tensor x, bool symmetric=True) -> Tensor",
    "bsr_linear": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, int out_features, "
        "Tensor? bias=None, str activation='none', Tensor? row_order=None) -> Tensor"
    ),
    "bsr_linear_grad_x": (
        "(Tensor grad, Tensor values, Tensor crow_indices, Tensor col_indices, int in_features) "
        "-> Tensor"
    ),
    "bsr_linear_grad_values": (
        "(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int[] block_size) "
        "-> Tensor"
    ),
    "bsr_conv2d": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, int out_channels, "
        "int[] kernel_size, Tensor? bias=None, int[] stride=[1, 1], int[] padding=[0, 0], "
        "int[] dilation=[1, 1], str activation='none', Tensor? row_order=None) -> Tensor"
    ),
    "bsr_int8_linear": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, "
        "Tensor weight_scales, Tensor weight_sums, Tensor? bias=None, str activation='none', "
        "Tensor? x_scale=None, Tensor? x_zero=None, bool symmetric=True, "
        "Tensor? row_order=None) -> Tensor"
    ),
    "huffman_decode": (
        "(Tensor stream, Tensor offsets, Tensor lengths, int num_symbols, int chunk_size) -> Tensor"
    ),
    "huffman_decode_out": (
        "(Tensor stream, Tensor offsets, Tensor lengths, int chunk_size, Tensor(a!) out) -> ()"
    ),
    "huffman_decode_planes": (
        "(Tensor(a!) out, Tensor[] planes, Tensor[] offsets, Tensor[] lengths, int chunk_size, "
        "bool turned=False) -> ()"
    ),
    "huffman_encode": "(Tensor symbols, Tensor lengths, int chunk_size) -> (Tensor, Tensor)",
    "merge_planes": "(Tensor(a!) out, Tensor[] planes, bool turned=False) -> ()",
    "pack_panels": (
        "(Tensor(a!) out, Tensor codes, int bits, int zero=0, Tensor(b!)? sums=None) -> ()"
    ),
    "winograd_conv2d": (
        "(Tensor x, Tensor weight, Tensor transformed, Tensor? bias=None, int[] padding=[0, 0], "
        "int groups=1, str activation='none', int tile=4) -> Tensor"
    ),
    "winograd_conv2d_grad": (
        "(Tensor x, Tensor grad, int[] kernel_size, int[] padding=[0, 0], int groups=1, "
        "int tile=4) -> Tensor"
    ),
}

# `compressops` holds the public ops; the compiled libraries register their kernels in
# `compressops_native` under the same names, for the dispatch keys that they serve.
PUBLIC = "compressops"
NATIVE = "compressops_native"

_libraries = {name: torch.library.Library(name, "FRAGMENT") for name in (PUBLIC, NATIVE)}
for _library in _libraries.values():
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def library(namespace: str) -> torch.library.Library:
    """The library that defines a namespace's ops and lives as long as the process."""
    return _libraries[namespace]


def public_op(name: str) -> torch._ops.OpOverload:
    """The op that users, autograd and `torch.compile` see."""
    return getattr(torch.ops.compressops, name).default


def native_op(name: str) -> torch._ops.OpOverload:
    """The op whose CPU and CUDA kernels the compiled libraries register."""
    return getattr(torch.ops.compressops_native, name).default
