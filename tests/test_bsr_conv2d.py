"""bsr_conv2d: every backend against float64 on the dense weight with its missing blocks as 0."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from bsr_cases import Case as Weight
from bsr_cases import grid
from bsr_cases import make as make_weight
from conftest import kernel_params
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bsr_linear import assert_close, finish

import compressops as co

OP = "bsr_conv2d"
ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params(OP), indirect=True)
CPU = torch.device("cpu")
# Where its library is there.
NATIVE = [False, *([True] if any(p.values[0][1] == "cpu" for p in kernel_params(OP)) else [])]


@dataclass(frozen=True)
class Case:
    n: int = 2
    c: int = 5
    h: int = 9
    w: int = 8
    k: int = 34
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    block: tuple[int, int] = (16, 1)
    density: float = 0.4
    dtype: torch.dtype = torch.float32
    values_dtype: torch.dtype | None = None
    bias: bool = True
    activation: str = "none"

    def __str__(self) -> str:
        told = ((f.name, getattr(self, f.name)) for f in fields(self))
        defaults = {f.name: f.default for f in fields(self)}
        told = (f"{name}={value}" for name, value in told if value != defaults[name])
        return ",".join(told).replace(" ", "") or "-"

    @property
    def inputs(self) -> int:
        return self.c * self.kernel[0] * self.kernel[1]

    @property
    def steps(self) -> tuple:
        return self.stride, self.padding, self.dilation


POINT = {"kernel": (1, 1), "padding": (0, 0)}
CASES = [
    Case(),
    Case(n=0),
    Case(n=1, c=1, h=1, w=1, k=1, **POINT),
    # no block, all, one of several rows
    *(Case(density=density, c=c) for density in (0.0, 1.0) for c in (1, 20)),
    Case(k=0),
    # pixels on both sides of halves of 8, and of the tiles of 16 that two make
    *(Case(h=h, w=w) for h, w in ((1, 1), (2, 3), (7, 7), (5, 11), (3, 33), (13, 17), (4, 16))),
    *(Case(c=c, h=h, w=w, **POINT) for c, h, w in ((3, 5, 8), (16, 3, 5), (17, 1, 7), (4, 9, 9))),
    Case(padding=(0, 0)),
    Case(h=12, w=18, padding=(0, 0)),
    # outputs on both sides of strips and groups, blocks of other sizes
    *(Case(n=1, k=k) for k in (1, 15, 16, 31, 33, 64, 131)),
    *(Case(n=1, block=block) for block in ((1, 1), (2, 1), (4, 6), (8, 5), (24, 2), (3, 7))),
    *(Case(c=c, block=(16, 16), k=48) for c in (16, 32, 7)),
    *(Case(c=c, block=(32, 4), **POINT) for c in (8, 10)),
    Case(c=3, h=23, w=21, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Case(kernel=(1, 4), padding=(0, 2)),
    Case(kernel=(5, 2), stride=(3, 1), padding=(1, 0)),
    Case(stride=(2, 3), dilation=(2, 1)),
    Case(stride=(2, 2), h=16, w=16),
    Case(stride=(2, 2), h=15, w=40, **POINT),
    Case(stride=(1, 2), kernel=(3, 1), padding=(2, 0)),
    # one column, of which a step leaves the image
    Case(h=19, w=1, stride=(1, 3)),
    Case(dilation=(1, 2), padding=(0, 3)),
    Case(h=2, w=40, dilation=(9, 30), padding=(9, 30)),
    # windows that lie in the padding altogether
    Case(padding=(4, 5)),
    Case(n=1, h=2, w=3, padding=(9, 0), dilation=(3, 1), stride=(4, 1)),
    Case(h=3, w=3, kernel=(5, 5)),
    # images together, and in strips of rows
    Case(n=9, c=40, h=6, w=6),
    Case(n=3, c=300, h=30, w=20, density=0.05),
    Case(n=1, c=1500, h=4, w=60, density=0.01, **POINT),
    *(Case(dtype=dtype, c=18) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(values_dtype=dtype, k=20) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(dtype=torch.bfloat16, stride=(s, s), block=(8, 1)) for s in (2, 3)),
    *(Case(activation=name) for name in ("relu", "gelu")),
    Case(bias=False, activation="relu"),
    Case(dtype=torch.float16, activation="gelu"),
]
SMALL = Case(n=1, h=4, w=5)
INTERPRETED = [
    Case(n=0),
    replace(SMALL, n=2, c=1, h=1, w=1, k=1, **POINT),
    *(replace(SMALL, c=7, block=block) for block in ((16, 16), (24, 5), (8, 1))),
    replace(SMALL, c=16, k=70, block=(32, 32), density=1.0),
    replace(SMALL, h=7, w=9, kernel=(2, 4), stride=(2, 3), padding=(0, 2), dilation=(3, 1)),
    replace(SMALL, h=2, w=3, padding=(9, 5), dilation=(3, 1), stride=(4, 3), bias=False),
    *(replace(SMALL, dtype=dtype, activation="gelu") for dtype in (torch.float16, torch.bfloat16)),
    replace(SMALL, values_dtype=torch.bfloat16, activation="relu"),
]


def make(case: Case, device: torch.device, pack: bool = False, last: bool = False) -> tuple:
    """The arguments of bsr_conv2d."""
    x = torch.randn(case.n, case.c, case.h, case.w, device=device).to(case.dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    like = Weight(1, case.inputs, case.k, case.block, case.density, case.dtype)
    like = replace(like, values_dtype=case.values_dtype, bias=case.bias)
    _, *bsr, _, bias, _ = make_weight(like, device, pack)
    return x, *bsr, case.k, case.kernel, bias, *case.steps, case.activation


def dense_of(values, crow, col, k: int, c: int, kernel: tuple[int, int]) -> torch.Tensor:
    """``[K, C, R, S]`` in the dtype of values."""
    matrix = co.ops.bsr_to_dense(values, crow, col, k, c * kernel[0] * kernel[1])
    return matrix.view(k, *kernel, c).permute(0, 3, 1, 2)


def assert_matches(actual: torch.Tensor, args: tuple) -> None:
    x, values, crow, col, k, kernel, bias, *steps, activation = args
    assert actual.dtype == x.dtype
    if not actual.numel():
        like = F.conv2d(x[:1], x.new_zeros(1, x.shape[1], *kernel), None, *steps)
        assert actual.shape == (len(x), k, *like.shape[2:])
        return
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    assert actual.is_contiguous(memory_format=form)
    weight = dense_of(values, crow, col, k, x.shape[1], kernel).cpu().double()
    images, offset = x.cpu().double(), None if bias is None else bias.cpu().double()[:, None, None]
    expected = finish(F.conv2d(images, weight, None, *steps), offset, activation)
    size = F.conv2d(images.abs(), weight.abs(), None, *steps)
    size = 1.2 * size + (0 if bias is None else offset.abs()) + (3 if activation == "gelu" else 0)
    assert_close(actual, expected, size, x.dtype, 1)


@grid(OP, CASES, INTERPRETED)
def test_matches_float64(kernel: torch.device, case: Case) -> None:
    for pack, last in ((False, True), (True, False), (True, True)):
        args = make(case, kernel, pack, last)
        assert_matches(co.ops.bsr_conv2d(*args), args)


@given(
    st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 40),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    *(st.tuples(st.integers(least, 3), st.integers(least, 3)) for least in (1, 0, 1)),
    st.tuples(st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 5)),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
@settings(max_examples=100)
def test_random_shapes(size, k, kernel, stride, padding, dilation, block, density, seed) -> None:
    torch.manual_seed(seed)
    reach = [d * (taps - 1) + 1 for d, taps in zip(dilation, kernel, strict=True)]
    n, c, h, w = size
    h, w = max(h, reach[0] - 2 * padding[0]), max(w, reach[1] - 2 * padding[1])
    case = Case(n, c, h, w, k, kernel, stride, padding, dilation, block, density)
    args = make(case, CPU, pack=bool(seed % 2), last=bool(seed // 2 % 2))
    assert_matches(co.ops.bsr_conv2d(*args), args)


@ALL_KERNELS
def test_any_strides_and_formats_give_the_same(kernel: torch.device) -> None:
    x, values, crow, col, *rest = make(Case(n=3, c=6), kernel)
    whole = co.ops.bsr_conv2d(x, values, crow, col, *rest)
    wide = torch.randn(3, 6, 9, 16, device=kernel)
    wide[..., ::2] = x
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    for images in (wide[..., ::2], swapped, last):
        assert torch.equal(co.ops.bsr_conv2d(images, values, crow, col, *rest), whole)
    strided = values.transpose(1, 2).contiguous().transpose(1, 2)
    twice = (crow.repeat_interleave(2)[::2], col.repeat_interleave(2)[::2])
    assert torch.equal(co.ops.bsr_conv2d(x, strided, *twice, *rest), whole)
    assert torch.equal(co.ops.bsr_conv2d(x[1:2], values, crow, col, *rest), whole[1:2])


@pytest.mark.parametrize("piece", [1, 200, 1 << 22])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradients_are_those_of_the_dense_layer(
    activation: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("compressops.ops.bsr_conv2d"), "_PIECE", piece)
    case = Case(stride=(2, 1), padding=(1, 2), dilation=(1, 2), activation=activation)
    for last in (False, True):
        x, values, crow, col, k, kernel, bias, *rest = make(case, CPU, last=last)
        leaves = [t.requires_grad_() for t in (x, values, bias)]
        y = co.ops.bsr_conv2d(x, values, crow, col, k, kernel, bias, *rest)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, leaves, grad)
        inputs, blocks, offset = (t.detach().double().requires_grad_() for t in leaves)
        dense = dense_of(blocks, crow, col, k, 5, kernel)
        y = finish(F.conv2d(inputs, dense, None, *rest[:3]), offset[:, None, None], activation)
        expected = torch.autograd.grad(y, (inputs, blocks, offset), grad.double())
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours.double(), theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision(dtype: torch.dtype) -> None:
    case = Case(c=3, dtype=dtype, k=16)
    x, values, crow, col, *rest = make(case, CPU)
    leaves = (x.requires_grad_(), values.requires_grad_())
    y = co.ops.bsr_conv2d(*leaves, crow, col, *rest)
    found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    floats = [t.detach().float().requires_grad_() for t in leaves]
    y = co.ops.bsr_conv2d(*floats, crow, col, *rest)
    expected = torch.autograd.grad(y, floats, torch.ones_like(y))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.allclose(ours.float(), theirs, atol=0.2, rtol=0.05)


def test_gradients_of_half_precision_are_added_up_in_float32() -> None:
    case = Case(n=5, c=4, h=120, w=120, k=16, kernel=(7, 7), padding=(3, 3), dtype=torch.bfloat16)
    x, values, crow, col, k, kernel, bias, *rest = make(case, CPU)
    leaves = (x.requires_grad_(), bias.requires_grad_())
    grad = torch.randn(5, 16, 120, 120).to(x.dtype)
    y = co.ops.bsr_conv2d(leaves[0], values, crow, col, k, kernel, leaves[1], *rest)
    found, _ = torch.autograd.grad(y, leaves, grad)
    weight = dense_of(values, crow, col, k, 4, kernel).double()
    expected = torch.nn.grad.conv2d_input(x.shape, weight, grad.double(), padding=3)
    assert (found.double() - expected).norm() < 0.003 * expected.norm()
    # More than float16 holds.
    y = co.ops.bsr_conv2d(x.half(), values, crow, col, k, kernel, bias, *rest)
    (found,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(found, torch.full((16,), 5.0 * 120 * 120))


def test_gradients_of_gradients() -> None:
    x, values, crow, col, k, kernel, bias, *rest = make(Case(), CPU)

    def second(x: torch.Tensor, values: torch.Tensor, layer) -> tuple[torch.Tensor, ...]:
        leaves = (x.requires_grad_(), values.requires_grad_())
        first = torch.autograd.grad(layer(*leaves).tanh().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    found = second(
        *(x.clone(), values.clone()),
        lambda x, v: co.ops.bsr_conv2d(x, v, crow, col, k, kernel, bias, *rest),
    )
    expected = second(
        *(x.double(), values.double()),
        lambda x, v: F.conv2d(x, dense_of(v, crow, col, k, 5, kernel), bias.double(), *rest[:3]),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=2e-4)


def test_packed_values_have_no_gradient() -> None:
    x, values, *rest = make(Case(), CPU, pack=True)
    co.ops.bsr_conv2d(x.requires_grad_(), values, *rest).sum().backward()
    y = co.ops.bsr_conv2d(x, values.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match="bsr_conv2d: argument 'values'"):
        y.sum().backward()


@ALL_KERNELS
def test_opcheck(kernel: torch.device) -> None:
    case = replace(SMALL, c=2, k=17, block=(16, 9), activation="gelu", stride=(2, 1))
    for pack in (False, True):
        x, values, *rest = make(case, kernel, pack, last=not pack)
        args = (x.requires_grad_(), values.requires_grad_(not pack), *rest)
        torch.library.opcheck(torch.ops.compressops.bsr_conv2d.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    x, *rest = make(Case(n=4), CPU, pack=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return co.ops.bsr_conv2d(x * 2, *rest) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:3]), layer(x[:3]))
    assert torch.equal(compiled(x[:3, :, 1:]), layer(x[:3, :, 1:]))


def test_compiles_with_its_gradients() -> None:
    x, values, *rest = make(Case(activation="relu"), CPU)

    def loss(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return co.ops.bsr_conv2d(x, values, *rest).square().sum()

    leaves = (x.requires_grad_(), values.requires_grad_())
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        assert torch.equal(found, expected)


NAMES = (
    *("x", "values", "crow_indices", "col_indices", "out_channels", "kernel_size", "bias"),
    *("stride", "padding", "dilation", "activation"),
)
INT32 = torch.int32
BAD = {
    "x": [
        torch.randn(2, 5, 9, 8).double(),
        torch.randn(5, 9, 8),
        torch.randn(2, 4, 9, 8),
        torch.randn(2, 5, 0, 8),
        torch.randn(2, 0, 9, 8),
        torch.randn(2, 5, 9, 0),
        torch.randn(0, 5, 0, 0),
    ],
    "values": [
        torch.randn(2, 16, 1).double(),
        torch.randn(2, 16),
        torch.randn(2, 0, 1),
        torch.randn(2, 16, 1, 2),
        torch.randn(3, 16, 1),
    ],
    "crow_indices": [
        torch.tensor([0, 2], dtype=INT32),
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([0, 1, 1, 3], dtype=INT32),
        torch.tensor([0, -1, 1, 2], dtype=INT32),
    ],
    "col_indices": [
        torch.tensor([0, 1, 2], dtype=INT32),
        torch.tensor([0, 44]),
        torch.tensor([0, 45], dtype=INT32),
        torch.tensor([-1, 44], dtype=INT32),
        torch.tensor([-(2**31), 2**31 - 1], dtype=INT32),
    ],
    "out_channels": [-1, 50, 2**62],
    "kernel_size": [[0, 3], [3], [3, 3, 3], [4097, 3], [2**62, 3], [3, 20]],
    "bias": [torch.zeros(33), torch.zeros(34, dtype=torch.int64)],
    "stride": [[0, 1], [1], [1, 1, 1], [2**31, 1], [-1, 1]],
    "padding": [[-1, 0], [0], [2**31, 0], [2**62, 2**62]],
    "dilation": [[0, 1], [1], [2**62, 1], [8, 1]],
    "activation": ["swish", ""],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("native", NATIVE)
def test_bad_arguments_are_named_with_their_value(name: str, native: bool) -> None:
    good = dict(zip(NAMES, make(Case(), CPU), strict=True))
    good["values"] = torch.randn(2, 16, 1)
    good["crow_indices"] = torch.tensor([0, 1, 1, 2], dtype=INT32)
    good["col_indices"] = torch.tensor([0, 44], dtype=INT32)
    op = torch.ops.compressops_native.bsr_conv2d if native else co.ops.bsr_conv2d
    op(**good)
    for bad in BAD[name]:
        with pytest.raises(ValueError, match="bsr_conv2d: argument '") as error:
            op(**{**good, name: bad})
        assert "got" in str(error.value)
