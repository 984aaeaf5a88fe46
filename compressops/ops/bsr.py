"""What the ops on block-sparse weights share: blocks from and to dense matrices, checks, packing.

A weight ``[N, K]`` in block-sparse rows (BSR, as torch has it) is ``values [nnz, r, c]``, its
stored blocks of r outputs and c inputs, by rows; ``crow_indices`` int32 ``[ceil(N / r) + 1]``,
where each row of blocks begins; ``col_indices`` int32 ``[nnz]``, the blocks' columns, ascending in
a row. N and K need not be multiples of r and c: what a block holds beyond them is ignored.

Packed, it is one of smaller blocks, each transposed: ``values [nnz, c / depth, r, depth]`` for r of
at most 16, so that the outputs of one input lie side by side. ``depth`` is 1, or 4 of int8, which
VNNI sums in one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .checks import ACTIVATIONS, require, version
from .huge_pages import on_huge_pages

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CELL = 16  # outputs that CUDA kernels multiply together
STRIPS = (16, 8, 4, 2, 1)  # outputs of a packed block: the first that divides r


def bsr_from_dense(
    weight: torch.Tensor, block_size: Sequence[int], keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks of a dense ``[N, K]`` that hold anything but 0.

    Args:
        weight: ``[N, K]`` of any dtype.
        block_size: r and c, 1 or more.
        keep: bool ``[ceil(N / r), ceil(K / c)]``, the blocks to store instead; None: the nonzero.

    Returns:
        values ``[nnz, r, c]``, padded with 0 at a ragged edge; crow_indices int32
        ``[ceil(N / r) + 1]``; col_indices int32 ``[nnz]``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = "bsr_from_dense"
    require(weight.dim() == 2, op, "weight", "of two dimensions [N, K]", weight)
    r, c = check_block_size(op, block_size)
    (N, K), (rows, columns) = weight.shape, grid(weight.shape, block_size)
    padded = F.pad(weight, (0, columns * c - K, 0, rows * r - N))
    blocks = padded.reshape(rows, r, columns, c).transpose(1, 2)
    if keep is None:
        keep = (blocks != 0).flatten(2).any(2)
    fits = keep.dtype == torch.bool and tuple(keep.shape) == (rows, columns)
    require(fits, op, "keep", f"bool [{rows}, {columns}] or None", keep)
    crow = F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return blocks[keep], crow, keep.nonzero()[:, 1].to(torch.int32)


def bsr_to_dense(
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
) -> torch.Tensor:
    """The dense ``[out_features, in_features]`` of a weight in block-sparse rows, packed or not.

    Blocks that are stored twice add up.

    Raises:
        ValueError: the arguments are not such a weight; the message names one and its value.
    """
    op = "bsr_to_dense"
    check_structure(op, values, crow_indices, col_indices, out_features, in_features)
    check_indices(op, values, crow_indices, col_indices, in_features)
    blocks = unpacked(values)
    r, c = blocks.shape[1:]
    rows, columns = grid((out_features, in_features), (r, c))
    dense = blocks.new_zeros(rows, columns, r, c)
    dense.index_put_((row_indices(crow_indices), col_indices.long()), blocks, accumulate=True)
    return dense.transpose(1, 2).reshape(rows * r, columns * c)[:out_features, :in_features]


def grid(shape: Sequence[int], block_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of blocks."""
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """``[M, K]`` of ``[..., K]``, also where K is 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def row_indices(crow_indices: torch.Tensor) -> torch.Tensor:
    """int64 ``[nnz]``: the row of each stored block."""
    rows = torch.arange(len(crow_indices) - 1, device=crow_indices.device)
    return rows.repeat_interleave(crow_indices.diff())


def block_size_of(values: torch.Tensor) -> tuple[int, int]:
    """r and c of ``values``, packed or not."""
    if values.dim() == 4:
        return values.shape[2], values.shape[1] * values.shape[3]
    return values.shape[1], values.shape[2]


def transposed(
    crow_indices: torch.Tensor, col_indices: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The stored blocks by columns, without waiting for a GPU: int32 ``[columns + 1]``, where each
    column begins, and of its blocks int32 ``[nnz]`` the row and int64 ``[nnz]`` the number."""
    sorted_columns, order = torch.sort(col_indices, stable=True)
    bounds = torch.arange(columns + 1, dtype=torch.int32, device=col_indices.device)
    starts = torch.searchsorted(sorted_columns, bounds, out_int32=True)
    return starts, rows_of_blocks(crow_indices, len(col_indices))[order], order


def rows_of_blocks(crow_indices: torch.Tensor, nnz: int) -> torch.Tensor:
    """int32 ``[nnz]``: as `row_indices`, without waiting for a GPU."""
    numbers = torch.arange(nnz, dtype=torch.int32, device=crow_indices.device)
    return torch.searchsorted(crow_indices[1:], numbers, right=True, out_int32=True)


def products(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
    transposed: bool = False,
) -> torch.Tensor:
    """float32 ``x @ W.T``, or ``x @ W``, in plain PyTorch, of stored blocks alone, whatever ``x``
    holds where no block meets it."""
    x, size = x.float(), (out_features, in_features)
    dense = bsr_to_dense(values.float(), crow_indices, col_indices, *size)
    y = x @ (dense if transposed else dense.t())
    if y.isfinite().all():
        return y
    # Its 0 · NaN are not ours: once more without what no stored block meets.
    blocks, out, inner = unpacked(values).float(), row_indices(crow_indices), col_indices.long()
    if transposed:
        blocks, out, inner, size = blocks.transpose(1, 2), inner, out, size[::-1]
    r, c = blocks.shape[1:]
    rows, columns = grid(size, (r, c))
    tiles = F.pad(rows_of(x), (0, columns * c - size[1])).unflatten(1, (-1, c))
    # What a block holds beyond the last input is ignored, whatever it is.
    beyond = inner[:, None] * c + torch.arange(c, device=x.device) >= size[1]
    blocks = blocks.masked_fill(beyond[:, None], 0)
    sums = x.new_zeros(rows, len(tiles), r)
    sums.index_add_(0, out, torch.einsum("mbc,brc->bmr", tiles[:, inner], blocks))
    return sums.transpose(0, 1).reshape(len(tiles), rows * r)[:, : size[0]].reshape(y.shape)


def unpacked(values: torch.Tensor) -> torch.Tensor:
    """``[nnz, r, c]`` of either form."""
    return values.transpose(1, 2).flatten(2) if values.dim() == 4 else values


def check_block_size(op: str, block_size: Sequence[int]) -> tuple[int, int]:
    """r and c, or a ``ValueError``."""
    fits = len(block_size) == 2 and all(side >= 1 for side in block_size)
    require(fits, op, "block_size", "two integers from 1 on", list(block_size))
    return block_size[0], block_size[1]


def check_structure(
    op: str,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
    dtypes: Sequence[torch.dtype] | None = None,
    depths: Sequence[int] = (1, 4),
) -> None:
    """Raise a ``ValueError`` unless dtypes and shapes are those of such a weight."""
    require(out_features >= 0, op, "out_features", "0 or more", out_features)
    require(in_features >= 0, op, "in_features", "0 or more", in_features)
    fits = values.dim() == 3 or (
        values.dim() == 4 and values.shape[2] in STRIPS and values.shape[3] in depths
    )
    fits = fits and 0 not in values.shape[1:] and (dtypes is None or values.dtype in dtypes)
    kinds = ", ".join(str(dtype) for dtype in dtypes or ("any dtype",))
    form = f"[nnz, r, c], or packed [nnz, c / {depths[0]}, r, {depths[0]}], of {kinds}"
    require(fits, op, "values", form, values)
    check_index_tensors(
        op, crow_indices, col_indices, out_features, block_size_of(values)[0], values.device
    )
    fits = len(col_indices) == len(values)
    require(fits, op, "col_indices", f"int32 [{len(values)}]", col_indices)


def check_weight(
    op: str,
    like: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
) -> None:
    """As `check_structure`, of floats where ``like`` is."""
    require(values.device == like.device, op, "values", f"on {like.device}", values)
    check_structure(op, values, crow_indices, col_indices, out_features, in_features, DTYPES, (1,))


def check_index_tensors(
    op: str,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    r: int,
    device: torch.device,
) -> None:
    """Raise a ``ValueError`` unless dtypes and shapes of the indices fit."""
    lengths = {"crow_indices": -(-out_features // r) + 1, "col_indices": "nnz"}
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        length = lengths[name]
        fits = tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.device == device
        fits = fits and length in ("nnz", len(tensor))
        require(fits, op, name, f"int32 [{length}] on {device}", tensor)


def check_indices(
    op: str,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    in_features: int,
    ascending: bool = False,
) -> None:
    """Raise a ``ValueError`` unless the indices lie in the grid of blocks (and ascend in a row)."""
    check_index_values(
        op, crow_indices, col_indices, -(-in_features // block_size_of(values)[1]), ascending
    )


def check_index_values(
    op: str,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    columns: int,
    ascending: bool = False,
) -> None:
    """As `check_indices`, with the columns of the grid."""
    nnz = len(col_indices)
    first, last = int(crow_indices[0]), int(crow_indices[-1])
    form = f"ascending from 0 to {nnz}"
    require(first == 0 and last == nnz, op, "crow_indices", form, f"{first} to {last}")
    falls = (crow_indices.diff() < 0).nonzero().flatten()
    if len(falls):
        at = int(falls[0])
        require(False, op, "crow_indices", form, f"{crow_indices[at : at + 2].tolist()} at {at}")
    if nnz == 0:
        return
    least, most = (int(value) for value in torch.aminmax(col_indices))
    inside = least >= 0 and most < columns
    require(inside, op, "col_indices", f"from 0 to {columns - 1}", f"{least} to {most}")
    if ascending:
        steps = col_indices.diff() <= 0
        inner = torch.ones_like(steps)  # of steps from one block of a row to the next
        starts = crow_indices[1:-1].long() - 1
        inner[starts[(starts >= 0) & (starts < nnz - 1)]] = False
        wrong = (steps & inner).nonzero().flatten()
        at = int(wrong[0]) if len(wrong) else 0
        pair = col_indices[at : at + 2].tolist()
        require(len(wrong) == 0, op, "col_indices", "ascending in each row", f"{pair} at {at}")


# By col_indices: the crow_indices, versions and columns with which they were found to be sound.
_sound = WeakTensorKeyDictionary()


def check_index_values_once(
    op: str, crow_indices: torch.Tensor, col_indices: torch.Tensor, columns: int
) -> None:
    """As `check_index_values`, but of tensors that nobody wrote to since they were checked, it is
    silent at once. A check waits for the GPU, which a layer cannot afford at each call and a
    CUDA graph not at all."""
    if crow_indices.is_inference() or col_indices.is_inference():  # they count no writes
        check_index_values(op, crow_indices, col_indices, columns)
        return
    state = (version(crow_indices), version(col_indices), columns)
    rows, known = _sound.get(col_indices, (None, None))
    if known == state and rows() is crow_indices:
        return
    check_index_values(op, crow_indices, col_indices, columns)
    _sound[col_indices] = (TensorWeakRef(crow_indices), state)


# By row_order: the version and number of rows with which it was found to be one.
_permutations = WeakTensorKeyDictionary()


def check_row_order(
    op: str, row_order: torch.Tensor | None, crow_indices: torch.Tensor, values: bool = True
) -> None:
    """Raise a ``ValueError`` unless ``row_order`` fits a weight; with ``values`` unless it is a
    permutation too, which of a tensor that nobody wrote to since is known at once."""
    if row_order is None:
        return
    rows, device = len(crow_indices) - 1, crow_indices.device
    fits = row_order.dtype == torch.int32 and row_order.device == device
    fits = fits and tuple(row_order.shape) == (rows,)
    require(fits, op, "row_order", f"int32 [{rows}] on {device} or None", row_order)
    state = (version(row_order), rows)
    counts = not row_order.is_inference()  # its writes
    if not values or (counts and _permutations.get(row_order) == state):
        return
    ordered = row_order.sort().values
    wrong = (ordered != torch.arange(rows, device=device)).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        form = f"a permutation of 0 to {rows - 1}"
        require(False, op, "row_order", form, f"{int(ordered[at])} in the place of {at}, sorted")
    if counts:
        _permutations[row_order] = state


def check_indices_once(
    op: str,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    in_features: int,
) -> None:
    """As `check_index_values_once`, with the width of the weight."""
    columns = -(-in_features // block_size_of(values)[1])
    check_index_values_once(op, crow_indices, col_indices, columns)


def refusal(values: torch.Tensor, dtype: torch.dtype, transposed: bool = False) -> str | None:
    """Why the CUDA kernel that multiplies x of a dtype by blocks, or transposed ones, does not take
    these; None: it does."""
    if values.dim() == 4:
        return "values that were packed for a CPU"
    if values.dtype == torch.int8:
        dtype = torch.int8
    elif values.dtype != dtype:
        dtype = torch.float32  # in which operands of two dtypes are multiplied
    block_size = values.shape[1:]
    out, depth = reversed(block_size) if transposed else block_size
    if out % CELL == 0 and depth * dtype.itemsize % 16 == 0:
        return None
    sides = ("c", "r") if transposed else ("r", "c")
    return (
        f"blocks of {block_size[0]} × {block_size[1]}: its tiles want {sides[0]} to be a multiple "
        f"of {CELL}, and {sides[1]} of {16 // dtype.itemsize} in {dtype}"
    )


def check_epilogue(
    op: str, x: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: str
) -> None:
    """Raise a ``ValueError`` unless x, bias and activation fit."""
    require(x.dim() >= 1 and x.dtype in DTYPES, op, "x", "float32, float16 or bfloat16 [..., K]", x)
    if bias is not None:
        fits = bias.dtype in DTYPES and tuple(bias.shape) == (out_features,)
        fits = fits and bias.device == x.device
        require(fits, op, "bias", f"float [{out_features}] on {x.device} or None", bias)
    known = activation in ACTIVATIONS
    require(known, op, "activation", f"one of {ACTIVATIONS}", repr(activation))


def pack(
    op: str,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
    depth: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight packed for a CPU, after all checks of its indices; elsewhere as it is."""
    require(values.dim() == 3, op, "values", "[nnz, r, c]", values)
    check_indices(op, values, crow_indices, col_indices, in_features, ascending=True)
    if values.device.type != "cpu":
        return values.contiguous(), crow_indices.contiguous(), col_indices.contiguous()
    nnz, r, c = values.shape
    strip = next(width for width in STRIPS if r % width == 0)
    # What lies beyond the last input meets zeros of x, which would keep a NaN.
    beyond = col_indices[:, None] * c + torch.arange(c) >= in_features
    values = values.masked_fill(beyond[:, None], 0)
    values = values.view(nnz, r // strip, strip, c // depth, depth)
    # Each strip of outputs has the blocks of its row, in their order.
    strips = torch.arange(-(-out_features // strip))
    row, inside = strips // (r // strip), strips % (r // strip)
    counts = crow_indices.diff().long()[row]
    starts = F.pad(counts.cumsum(0), (1, 0))
    fits = starts[-1] < 2**31
    require(bool(fits), op, "col_indices", "less than 2^31 packed blocks", int(starts[-1]))
    shift = crow_indices.long()[row] - starts[:-1]
    block = torch.arange(int(starts[-1])) + shift.repeat_interleave(counts)
    packed = values[block, inside.repeat_interleave(counts)].transpose(1, 2).contiguous()
    return on_huge_pages(packed), starts.to(torch.int32), col_indices[block]
