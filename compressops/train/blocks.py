"""Linear layers that were pruned in blocks run on their stored blocks while they train on a CPU."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.ops import bsr_from_dense, bsr_linear
from compressops.ops.bsr import DTYPES, grid, row_indices
from compressops.train.overrides import overridden

if TYPE_CHECKING:
    from compressops.compress.parametrizations import Mask

# With more blocks than this part of all, or smaller ones, the dense product under its mask is as
# fast.
_MOST_STORED = 0.4
_LEAST_ENTRIES = 16


@contextlib.contextmanager
def sparse_linears(*models: nn.Module) -> Iterator[list[str]]:
    """Within the ``with`` block linear layers of ``models`` that are pruned in blocks multiply only
    those that are kept, forward and in both gradients (`ops.bsr_linear`).

    It concerns `nn.Linear` whose weight has a `Mask` of blocks of 16 entries or more, and of them
    the calls outside compiled graphs and torch.func, on CPU tensors of float32, float16 or
    bfloat16, while the mask keeps at most two fifths of the blocks, and lets none come back
    (``Mask.recover``); everything else runs as it would. A mask that moves is followed from the
    next call on. The weight is computed by its parametrizations as ever, so that quantizers act,
    and the optimizer trains the same dense original, whose gradient is 0 in what is pruned. Under
    autocast the input is cast, as for `nn.Linear`, but not the weight.

    Results differ from those of masked dense products by the order of sums; and an Inf or NaN of
    the input does not reach outputs that have no block there.

    Yields:
        The names of the modules concerned.
    """
    # `compress` imports this package.
    from compressops.compress.parametrizations import Mask, find

    def replacement(module: nn.Module) -> Callable[..., Tensor] | None:
        mask = find(module, Mask)
        # A class that multiplies in its own way goes on so.
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not plain or mask is None or math.prod(mask.block or ()) < _LEAST_ENTRIES:
            return None
        return functools.partial(_forward, module, _Stored(mask))

    with overridden(models, "forward", replacement) as names:
        yield names


@dataclass(frozen=True)
class _Blocks:
    """The blocks that a mask keeps: of each row and column, and as `ops.bsr_linear` takes them."""

    size: tuple[int, int]
    rows: Tensor
    columns: Tensor
    crow_indices: Tensor
    col_indices: Tensor


class _Stored:
    """The blocks of ``mask`` at present."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self._seen: tuple[Tensor, int] | None = None

    def blocks(self) -> _Blocks | None:
        """``None`` where the dense product is to run."""
        if self.mask.recover:
            return None
        mask = self.mask.mask
        if self._seen is None or self._seen[0] is not mask or self._seen[1] != mask._version:
            self._seen = mask, mask._version
            self._found = self._find()
        return self._found

    def _find(self) -> _Blocks | None:
        entries, size = self.mask.mask, self.mask.block
        found, crow, columns = bsr_from_dense(entries, size)
        if len(found) > _MOST_STORED * math.prod(grid(entries.shape, size)):
            return None
        return _Blocks(size, row_indices(crow), columns.long(), crow, columns)


class _Gather(torch.autograd.Function):
    """``[nnz, r, c]``, the stored blocks of a dense weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, blocks: _Blocks) -> Tensor:
        ctx.blocks, ctx.shape = blocks, weight.shape
        (r, c), (rows, columns) = blocks.size, grid(weight.shape, blocks.size)
        if weight.shape != (rows * r, columns * c):  # even of nothing, a padding is a copy
            below, right = rows * r - weight.shape[0], columns * c - weight.shape[1]
            weight = F.pad(weight, (0, right, 0, below))
        return weight.reshape(rows, r, columns, c)[blocks.rows, :, blocks.columns]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        blocks, (N, K) = ctx.blocks, ctx.shape
        (r, c), (rows, columns) = blocks.size, grid(ctx.shape, blocks.size)
        # No block is stored twice, so that nothing has to be added up.
        dense = grad.new_zeros(rows, r, columns, c)
        dense[blocks.rows, :, blocks.columns] = grad
        return dense.view(rows * r, columns * c)[:N, :K], None


def _forward(module: nn.Linear, stored: _Stored, input: Tensor) -> Tensor:
    weight, taken = module.weight, input
    if torch.is_autocast_enabled("cpu") and input.dtype in DTYPES:
        taken = input.to(torch.get_autocast_dtype("cpu"))
    elif input.dtype != weight.dtype:
        taken = None
    # A graph cannot hold how many blocks there are, and `_Gather` has no rule for torch.func.
    plain = torch._C._functorch.peek_interpreter_stack() is None
    plain = plain and not torch.compiler.is_compiling()
    blocks = stored.blocks() if plain else None
    fits = taken is not None and input.device.type == weight.device.type == "cpu"
    fits = fits and weight.dtype in DTYPES and taken.dtype in DTYPES
    if blocks is None or not fits or input.shape[-1:] != weight.shape[1:]:
        return F.linear(input, weight, module.bias)
    values = _Gather.apply(weight, blocks)
    indices = (blocks.crow_indices, blocks.col_indices)
    return bsr_linear(taken, values, *indices, module.out_features, module.bias)
