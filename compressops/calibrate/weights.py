"""Scales of integer weights by the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from compressops.formats import Int
from compressops.formats.number import matrix_shape

# Parts of each range that are tried: all of it, down to 0.3 in steps of 0.02. At 2 bits the best
# part of a normal distribution's range is about 0.4, at 4 bits 0.8.
_PARTS = 36
# Values of the rows that are fitted together: what the search reads 36 times stays in the cache.
_CHUNK = 2**15


def fit_mse(number: Int, weight: Tensor) -> dict[str, Tensor]:
    """Parameters of ``number`` with the least squared rounding error of each row or group.

    `Int.fit` takes the whole range of the values; a smaller one clips a few of them, and rounds all
    others finer.

    Args:
        number: of any bits, group size and symmetry.
        weight: float, any shape.

    Returns:
        as ``number.fit``, never with a larger error.

    Raises:
        ValueError: the weight holds NaN or infinities, or is of another dtype.
    """
    params = number.fit(weight)
    rows, columns = matrix_shape(tuple(weight.shape))
    matrix = weight.detach().float().reshape(rows, columns)
    step = max(1, _CHUNK // max(1, columns))
    for begin in range(0, rows, step):
        chunk = {name: value[begin : begin + step] for name, value in params.items()}
        chunk["scales"].copy_(_best_scales(number, matrix[begin : begin + step], chunk))
    return params


def _best_scales(number: Int, weight: Tensor, whole: dict[str, Tensor]) -> Tensor:
    """The scales of rows whose parameters for the whole range are ``whole``."""
    best, least = whole["scales"], torch.full_like(whole["scales"], torch.inf)
    for part in torch.linspace(1, 0.3, _PARTS).tolist():
        # The zero point is where the range begins over the scale: both shrink alike.
        params = {**whole, "scales": whole["scales"] * part}
        error = number.by_group((number.fake_quantize(weight, params) - weight).square()).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, params["scales"], best)
    return best
