"""In which order a GPU takes the rows of blocks of a block-sparse weight, so that likes meet."""

from __future__ import annotations

import numpy as np
import torch

from . import bsr
from .checks import require

TILE = 128  # outputs that a block of threads of the CUDA kernels computes
_WINDOW = 1024  # rows that are compared with each other: time and memory grow with the square
_PASSES = 20


def bsr_row_order(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_size: tuple[int, int],
    out_features: int,
    in_features: int,
) -> torch.Tensor | None:
    """An order of the rows of blocks of a weight ``[N, K]`` in which neighbours store like columns.

    A block of threads of the CUDA kernels computes 128 outputs, and fetches the inputs of every
    column that any of its rows of blocks stores: the fewer there are, the more alike the rows. Each
    tile begins with the fullest row that is left, and takes those that add the fewest columns; then
    rows of different tiles change places as long as that saves a column. The same weight has the
    same order everywhere. It is found on the CPU.

    Args:
        crow_indices, col_indices, out_features, in_features: as in :func:`bsr_linear_pack`.
        block_size: r and c.

    Returns:
        int32 ``[ceil(N / r)]`` on the device of the indices, a permutation, for the ``row_order``
        of :func:`bsr_linear` and its like; ``None`` where none would save anything.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = "bsr_row_order"
    r, _ = bsr.check_block_size(op, block_size)
    for name, size in (("out_features", out_features), ("in_features", in_features)):
        require(size >= 0, op, name, "0 or more", size)
    rows, columns = bsr.grid((out_features, in_features), block_size)
    device = crow_indices.device
    bsr.check_index_tensors(op, crow_indices, col_indices, out_features, r, device)
    bsr.check_index_values(op, crow_indices, col_indices, columns)
    # Blocks of other heights do not fill tiles evenly, or fill one alone.
    if TILE % r or r == TILE:
        return None
    stored = np.zeros((rows, columns), np.float32)
    stored[bsr.row_indices(crow_indices.cpu()), col_indices.cpu()] = 1
    order = np.arange(rows)
    for first in range(0, rows, _WINDOW):
        window = stored[first : first + _WINDOW]
        order[first : first + _WINDOW] = first + _likes_together(window, TILE // r)
    if columns_of_tiles(stored[order], r) >= columns_of_tiles(stored, r):
        return None
    return torch.from_numpy(order).to(device, torch.int32)


def columns_of_tiles(stored: np.ndarray, r: int) -> int:
    """How many columns all tiles together fetch, of rows of blocks ``[rows, columns]`` of 0 and 1
    in their order."""
    group = max(1, TILE // r)
    return sum(
        int(stored[first : first + group].any(0).sum()) for first in range(0, len(stored), group)
    )


def _likes_together(stored: np.ndarray, group: int) -> np.ndarray:
    """An order of rows of float32 0 and 1, ``group`` of which are a tile."""
    order = _picked(stored, group)
    rows = stored[order]

    def stored_by_rest(tile: slice) -> np.ndarray:
        """Of each of a tile's places, the columns that its other rows store."""
        return (rows[tile].sum(0) > rows[tile]).astype(np.float32).T

    def tile_of(place: int) -> slice:
        first = place // group * group
        return slice(first, first + group)

    # [p, q]: columns of the row at p that the rest of q's tile stores.
    shared = np.hstack([rows @ stored_by_rest(tile_of(p)) for p in range(0, len(rows), group)])
    for _ in range(_PASSES):
        before = order.copy()
        for p in range(len(rows)):
            tile, own = tile_of(p), shared.diagonal()
            # Columns that are saved if the rows at p and q change places; none within a tile.
            saved = shared[p] + shared[:, p] - own - own[p]
            saved[tile] = 0
            q = saved.argmax()
            if saved[q] <= 0:
                continue
            for of_place in (order, rows, shared):
                of_place[[p, q]] = of_place[[q, p]]
            for changed in (tile, tile_of(q)):
                shared[:, changed] = rows @ stored_by_rest(changed)
        if (order == before).all():
            break
    return order


def _picked(stored: np.ndarray, group: int) -> np.ndarray:
    """As `_likes_together`, row by row: first the fullest, then what adds the fewest columns."""
    order, counts, taken = np.arange(len(stored)), stored.sum(1, dtype=float), np.zeros(len(stored))
    for place in range(len(stored)):
        if place % group == 0:
            tile, added = np.zeros_like(stored[0]), taken
        else:
            added = counts - stored @ tile
        # Of those the fullest: it would be dear in another tile.
        row = (added * (stored.shape[1] + 1) - counts + taken).argmin()
        tile, taken[row], order[place] = np.maximum(tile, stored[row]), np.inf, row
    return order
