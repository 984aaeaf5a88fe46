"""Scales of integer weights by the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from compressops.formats import Int

# Parts of each range that are tried: all of it, down to 0.3 in steps of 0.01. At 2 bits the best
# part of a normal distribution's range is about 0.4, at 4 bits 0.8.
_PARTS = 71


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
    whole = number.fit(weight)
    best = {name: value.clone() for name, value in whole.items()}
    least = torch.full_like(whole["scales"], torch.inf)
    exact = weight.detach().float()
    for part in torch.linspace(1, 0.3, _PARTS).tolist():
        # The zero point is where the range begins over the scale: both shrink alike.
        params = {**whole, "scales": whole["scales"] * part}
        error = number.by_group((number.fake_quantize(exact, params) - exact).square()).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best["scales"] = torch.where(better, params["scales"], best["scales"])
    return best
