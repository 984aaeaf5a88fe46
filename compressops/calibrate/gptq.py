"""GPTQ: integer weights whose rounding errors make up for each other on a layer's inputs.

Frantar et al. 2022, arXiv:2210.17323: the columns of a weight are rounded one after the other, and
each one's error is taken back, as far as that is possible, by changing the columns that are not yet
rounded (eq. 2 and 3, in the order of algorithm 1). What is minimised is the error of the output,
``‖(W − Q) X‖²``, in place of that of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compressops.formats import Int

Fit = Callable[[Int, Tensor], dict[str, Tensor]]


class Hessian:
    """Of the squared output error of a linear layer, up to a factor: the mean of x xᵀ over its
    inputs x, float32 ``[in_features, in_features]``."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Take account of inputs ``[..., in_features]``.

        Raises:
            ValueError: they hold NaN or infinities, or are so large that their squares are.
        """
        x = x.detach().flatten(0, -2).float()
        if not len(x):
            return
        products = x.t() @ x
        if not bool(products.diagonal().isfinite().all()):
            raise ValueError(
                f"an input of {x.numel()} values holds {int((~x.isfinite()).sum())} that are NaN "
                f"or infinite, or one whose square is"
            )
        before, self.rows = self.rows, self.rows + len(x)
        if self.matrix is None:
            self.matrix = products.div_(self.rows)
        else:
            self.matrix.mul_(before / self.rows).add_(products, alpha=1 / self.rows)

    def error(self, difference: Tensor) -> float:
        """Mean over the inputs of ‖D x‖², for a difference of weights ``[out, in]``."""
        return float(((difference @ self.matrix) * difference).sum(dtype=torch.float64))


def gptq(
    weight: Tensor,
    hessian: Tensor,
    number: Int,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
    block_size: int = 128,
    mask: Tensor | None = None,
    fit: Fit = Int.fit,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight on the grid of ``number``, with the error compensated on the inputs of the Hessian.

    Args:
        weight: float ``[out_features, in_features]``.
        hessian: float ``[in_features, in_features]``, symmetric, as of `Hessian`.
        number: the integers.
        damping: this part of the mean of the Hessian's diagonal is added to the diagonal.
        activation_order: round the columns by descending diagonal of the Hessian. Groups then have
            the scales of the given weight, else those of the weight when the group is reached.
        block_size: columns after which the others are updated by one matrix product.
        mask: bool, of the weight's shape: the entries that are not to become 0.
        fit: ``fit(number, weight)`` gives parameters.

    Returns:
        The weight, float32, exactly on the grid, and the parameters of ``number`` for it.

    Raises:
        ValueError: the shapes disagree, the Hessian holds NaN or infinities, or has negative
            eigenvalues beyond the damping.
    """
    w = weight.detach().float().clone()
    rows, columns = w.shape
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(
            f"hessian must be [{columns}, {columns}] for a weight [{rows}, {columns}], got "
            f"{list(hessian.shape)}"
        )
    order = torch.arange(columns, device=w.device)
    if activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    root = _inverse_root(hessian[order][:, order], damping)
    keep = torch.ones((), dtype=torch.bool, device=w.device).expand(rows, columns)
    if mask is not None:
        keep, w = mask[:, order], w.masked_fill(~mask, 0.0)
    size = max(1, min(number.group_size or columns, columns))
    params = fit(number, w)
    # Each column has parameters of its own, so that columns of any order can be rounded.
    one = replace(number, group_size=None)
    group_of = (order // size).tolist()
    w = w[:, order]
    rounded = torch.empty_like(w)
    for begin, end in _blocks(columns, columns if activation_order else size, block_size):
        if begin and begin % size == 0 and not activation_order:
            group = slice(begin, begin + size)
            for name, value in fit(one, torch.where(keep[:, group], w[:, group], 0.0)).items():
                params[name][:, begin // size] = value[:, 0]
        errors = torch.empty(rows, end - begin, device=w.device)
        for j in range(begin, end):
            own = {n: value[:, group_of[j] : group_of[j] + 1] for n, value in params.items()}
            column = w[:, j : j + 1]
            q = torch.where(keep[:, j : j + 1], one.fake_quantize(column, own), 0.0)
            error = (column - q) / root[j, j]
            rounded[:, j : j + 1], errors[:, j - begin : j - begin + 1] = q, error
            w[:, j + 1 : end] -= error * root[j, j + 1 : end]
        w[:, end:] -= errors @ root[begin:end, end:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result, params


def _blocks(columns: int, size: int, block: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``block`` columns, none across a multiple of ``size``: the scales of a
    group are fitted when every column before it is rounded, and its error taken back."""
    for group in range(0, columns, max(1, size)):
        end = min(group + size, columns)
        for begin in range(group, end, block):
            yield begin, min(begin + block, end)


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with UᵀU = (H + damping · mean(diag H) · 1)⁻¹, float32."""
    if not bool(hessian.isfinite().all()):
        raise ValueError(f"hessian holds {int((~hessian.isfinite()).sum())} NaN or infinite values")
    h = hessian.double()
    if not bool(h.any()):
        # No input was ever other than 0: no error can be seen, none be taken back.
        return torch.eye(len(h), device=h.device)
    h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * h.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(h)
    if int(info):
        raise ValueError(
            f"hessian with damping={damping} is not positive definite (minor {int(info)} of "
            f"{len(h)}); use a larger damping"
        )
    inverse = torch.cholesky_inverse(factor)
    return torch.linalg.cholesky(inverse, upper=True).float()
