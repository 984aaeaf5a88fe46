"""bsr_row_order: that likes meet; and that an order changes no op's and no layer's result."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bsr_cases import Case, make
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st
from test_bsr_conv2d import Case as ConvCase
from test_bsr_conv2d import make as make_conv
from test_bsr_int8_linear import make as make_int8
from test_nn_block_sparse import in_blocks
from torch import nn

import compressops as co
from compressops.formats import BlockSparse, Float, Int
from compressops.nn import BlockSparseConv2d, BlockSparseInt8Linear, BlockSparseLinear, block_sparse
from compressops.ops.bsr_row_order import columns_of_tiles


def order_of(keep: torch.Tensor, r: int) -> torch.Tensor | None:
    """Of blocks r × 1."""
    sizes = (keep.shape[0] * r, keep.shape[1])
    _, crow, col = co.ops.bsr_from_dense(torch.ones(sizes), (r, 1), keep)
    return co.ops.bsr_row_order(crow, col, (r, 1), *sizes)


def columns(keep: torch.Tensor, r: int, order: torch.Tensor | None = None) -> int:
    ordered = keep if order is None else keep[order.long()]
    return columns_of_tiles(ordered.numpy(), r)


@given(
    st.integers(0, 60),
    st.integers(0, 30),
    st.sampled_from([1, 16, 32, 64]),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_a_permutation_that_saves_columns(
    rows: int, width: int, r: int, density: float, seed: int
) -> None:
    keep = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < density
    order = order_of(keep, r)
    if order is None:
        return
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(rows))
    assert columns(keep, r, order) < columns(keep, r)
    assert torch.equal(order, order_of(keep, r))


@pytest.mark.parametrize(("r", "rows"), [(64, 13), (32, 18), (16, 27)])
def test_no_exchange_of_two_rows_would_save_more(r: int, rows: int) -> None:
    for _ in range(10):
        keep = torch.rand(rows, 15) < torch.rand(rows, 1)
        order = order_of(keep, r)
        least = columns(keep, r, order)
        for p, q in itertools.combinations(range(rows), 2):
            other = order.clone()
            other[[p, q]] = order[[q, p]]
            assert columns(keep, r, other) >= least


@pytest.mark.parametrize("r", [16, 32, 64])
def test_rows_that_are_alike_are_found(r: int) -> None:
    group = 128 // r
    kinds = torch.rand(6, 80) < 0.2
    keep = kinds.repeat_interleave(group, 0)[torch.randperm(6 * group)]
    assert columns(keep, r, order_of(keep, r)) == int(kinds.sum())


@pytest.mark.parametrize(("density", "saved"), [(0.1, 0.3), (0.2, 0.25), (0.5, 0.05)])
def test_random_masks_save_what_they_should(density: float, saved: float) -> None:
    keep = torch.rand(96, 24) < density
    assert columns(keep, 16, order_of(keep, 16)) < (1 - saved) * columns(keep, 16)


def test_more_rows_than_are_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = torch.rand(150, 20) < 0.2
    whole = columns(keep, 16, order_of(keep, 16))
    # The package has the function under this name.
    module = importlib.import_module("compressops.ops.bsr_row_order")
    monkeypatch.setattr(module, "_WINDOW", 64)
    order = order_of(keep, 16).long()
    for first in (0, 64, 128):
        window = order[first : first + 64].sort().values
        assert torch.equal(window, torch.arange(first, min(150, first + 64)))
    assert whole <= columns(keep, 16, order) < 0.9 * columns(keep, 16)


def test_there_is_none_where_it_would_save_nothing() -> None:
    keep = torch.rand(40, 30) < 0.3
    for r in (128, 256, 48, 24):  # tiles of one row; those that end within one
        assert order_of(keep, r) is None
    assert order_of(keep[:8], 16) is None  # one tile
    for same in (torch.zeros(40, 30), torch.ones(40, 30), torch.ones(40, 0)):
        assert order_of(same.bool(), 16) is None


def test_bad_arguments_are_named_with_their_value() -> None:
    good = {
        "crow_indices": torch.tensor([0, 3, 5, 6, 7], dtype=torch.int32),
        "col_indices": torch.tensor([0, 1, 2, 0, 1, 2, 2], dtype=torch.int32),
        "block_size": (16, 16),
        "out_features": 50,
        "in_features": 40,
    }
    co.ops.bsr_row_order(**good)
    for name, bads in {
        "crow_indices": (good["crow_indices"].long(), good["crow_indices"][:-1]),
        "col_indices": (good["col_indices"] + 1, good["col_indices"] - 1),
        "block_size": ((16,), (0, 16)),
        "out_features": (-1,),
        "in_features": (-1,),
    }.items():
        for bad in bads:
            with pytest.raises(ValueError, match=f"bsr_row_order: argument '{name}'.* got "):
                co.ops.bsr_row_order(**{**good, name: bad})


OPS: dict[str, Callable[[torch.device, bool], tuple]] = {
    "bsr_linear": lambda device, pack: (
        *make(Case(3, 40, 50, activation="gelu"), device, pack),
        lambda args, order: (*args, order),
    ),
    "bsr_int8_linear": lambda device, pack: (
        *make_int8(Case(3, 40, 50), device, pack)[0],
        lambda args, order: (*args, None, None, True, order),
    ),
    "bsr_conv2d": lambda device, pack: (
        *make_conv(ConvCase(1, 8, 3, 3, 50, block=(16, 8), activation="relu"), device, pack),
        lambda args, order: (*args, order),
    ),
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        pytest.param(op, *kernel.values, id=f"{op}-{kernel.id}")
        for op in OPS
        for kernel in kernel_params(op)
    ],
    indirect=["kernel"],
)
def test_ops_take_an_order_and_refuse_what_is_none(
    op: str, kernel: torch.device, pack: bool
) -> None:
    *args, with_order = OPS[op](kernel, pack)
    call, rows = getattr(torch.ops.compressops, op), len(args[2]) - 1
    order = torch.randperm(rows).to(kernel, torch.int32)
    expected = call(*args)
    for good in (order, order.repeat_interleave(2)[::2]):
        torch.testing.assert_close(call(*with_order(args, good)), expected)
    twice, beyond, below = (order.clone() for _ in range(3))
    twice[0], beyond[order.argmax()], below[order.argmin()] = order[1], rows, -1
    for bad in (order[1:], order.long(), order[None], twice, beyond, below):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{op}: argument 'row_order' must be .* got"):
                call(*with_order(args, bad))
    # It was one when it was checked.
    order[0] = order[1]
    with pytest.raises(ValueError, match=f"{op}: argument 'row_order' must be a permutation"):
        call(*with_order(args, order))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_gradients(op: str) -> None:
    x, *args, with_order = OPS[op](torch.device("cpu"), False)
    call, x = getattr(torch.ops.compressops, op), x.requires_grad_()
    order = torch.randperm(len(args[1]) - 1, dtype=torch.int32)
    torch.library.opcheck(call.default, with_order([x, *args], order))
    (found,) = torch.autograd.grad(call(*with_order([x, *args], order)).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(call(x, *args).sum(), x)[0])


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    linear = in_blocks(nn.Linear(64, 272), (16, 16), 0.2)
    int8 = BlockSparseInt8Linear.from_float(linear, BlockSparse((16, 16)), Int(8))
    conv = in_blocks(nn.Conv2d(16, 272, 1), (16, 8), 0.2)
    return {
        "linear": (BlockSparseLinear.from_float(linear), torch.randn(3, 64)),
        "int8": (int8, torch.randn(3, 64)),
        "conv": (
            BlockSparseConv2d.from_float(conv, BlockSparse((16, 8)), Float()),
            torch.randn(2, 16, 5, 6),
        ),
    }


@pytest.mark.parametrize("name", ["linear", "int8", "conv"])
def test_layers_keep_an_order_where_a_kernel_takes_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layers()[name]
    expected, held = layer(x), layer.packed_weight
    assert held.kernel()[-1] is None  # on a CPU
    find, found = co.ops.bsr_row_order, []

    def ordered(*args) -> torch.Tensor:
        found.append(find(*args))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(block_sparse, "_takes_order", lambda values: True)
        patch.setattr(block_sparse.ops, "bsr_row_order", ordered)
        held.set_residency("decoded")
        order = held.kernel()[-1]
        assert order is found[0]
        assert np.array_equal(order.sort().values, np.arange(17))
        assert torch.equal(layer(x), expected)
        layer(x)
        assert len(found) == 1
        whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x), expected)
        assert not any("row_order" in key for key in layer.state_dict())
        for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(same.packed_weight.kernel()[-1], order)
        held.set_residency("packed")
        assert held.kernel()[-1] is None
        assert torch.equal(layer(x), expected)
