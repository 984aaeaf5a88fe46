"""The ternary number, and the scales that fit it to a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressops.formats.groupwise import MAX_GROUP_SIZE, grouped, groups, spread
from compressops.formats.number import Number, check_weight, matrix_shape
from compressops.formats.registry import check_choice, check_fraction, check_int

# The alternation of LAT stops where no entry changes sides, or here: each round lowers the error,
# and a start from the scale of the training step before rarely needs more than two.
_MAX_ROUNDS = 10


@dataclass(frozen=True)
class Ternary(Number):
    """{−α, 0, +α}, by one of two rules.

    With a ``threshold``, Ternary Weight Networks (Li et al. 2016, arXiv:1605.04711, eq. 3 to 6):
    Δ = threshold · mean|x|; a value is ±α where |x| > Δ, and α is the mean of those |x|.
    With ``threshold=None``, the least Σ d·(x − αb)² over α and b in {−1, 0, 1}: each value goes to
    the nearest of the three (Δ = α/2). With d = 1 that is the least squared error; with d the
    curvature of a loss, loss-aware ternarization (LAT; Hou & Kwok 2018, arXiv:1802.08635, eq. 5).

    Parameters: ``scales`` (α) float32 ``[1, 1]``, ``[rows, 1]`` or ``[rows, groups]``. Δ is not a
    parameter: ``quantize`` takes it from the weight that it is given, as TWN does, or from α; and
    any Δ in [0, α) gives a ternary weight back unchanged.

    Args:
        granularity: what shares an α: ``"tensor"``, ``"row"`` or ``"group"``.
        group_size: inputs in a group; given if and only if ``granularity="group"``.
        threshold: Δ over mean|x|, in [0, 1), or ``None``.
    """

    granularity: str = "tensor"
    group_size: int | None = None
    threshold: float | None = 0.7
    bits = 2

    def __post_init__(self) -> None:
        check_choice("Ternary", "granularity", self.granularity, ("tensor", "row", "group"))
        if self.granularity == "group":
            check_int("Ternary", "group_size", self.group_size, 1, MAX_GROUP_SIZE)
        elif self.group_size is not None:
            raise ValueError(
                f"Ternary: group_size goes with granularity='group', got group_size="
                f"{self.group_size!r} with granularity={self.granularity!r}"
            )
        if self.threshold is not None:
            check_fraction("Ternary", "threshold", self.threshold, 0, 1)

    def _view(self, weight: Tensor) -> Tensor:
        x = grouped(weight, self.group_size)
        return x.reshape(1, 1, x.numel()) if self.granularity == "tensor" else x

    def _mean(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Mean over the last dimension of ``_view``, its padding not counted, in float64."""
        rows, columns = matrix_shape(shape)
        if self.granularity == "tensor":
            counts = torch.tensor([rows * columns], device=x.device)
        else:
            _, count, size = groups(shape, self.group_size)
            starts = torch.arange(count, device=x.device) * size
            counts = (columns - starts).clamp(max=size)
        return x.double().sum(2) / counts.clamp(min=1)

    def param_shapes(
        self, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        size = (1, 1) if self.granularity == "tensor" else groups(shape, self.group_size)[:2]
        return {"scales": (torch.float32, size)}

    def fit(
        self, weight: Tensor, curvature: Tensor | None = None, start: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Parameters for ``weight`` (float, any shape), on its device.

        Args:
            curvature: d ≥ 0 of each entry, of the weight's shape; ``None``: 1. Goes with
                ``threshold=None``.
            start: scales to alternate from (`nearest_scales`); ``None``: the exact minimum.

        Raises:
            ValueError: ``weight`` is of another dtype, or holds NaN or infinities; or
                ``curvature`` or ``start`` does not go with the threshold or the weight.
        """
        check_weight(weight)
        shape = tuple(weight.shape)
        x = self._view(weight).abs()
        if self.threshold is None:
            d = self._view(torch.ones_like(weight) if curvature is None else curvature)
            if d.shape != x.shape:
                raise ValueError(
                    f"curvature of a weight {list(shape)} must have its shape, got "
                    f"{list(curvature.shape)}"
                )
            return {"scales": nearest_scales(x, d, start).float()}
        if curvature is not None or start is not None:
            raise ValueError(f"{self}: curvature and start go with threshold=None")
        large = x > self.threshold * self._mean(x, shape)[..., None]
        scales = (x.double() * large).sum(2) / large.sum(2).clamp(min=1)
        return {"scales": scales.float()}

    def _round(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        shape = tuple(weight.shape)
        if self.threshold is None:
            delta = params["scales"] / 2
        else:
            delta = self.threshold * self._mean(self._view(weight).abs(), shape)
        x = weight.detach().float().reshape(matrix_shape(shape))
        large = x.abs() > spread(delta, shape, self.group_size)
        # NaN compares false: keep it visible instead of turning it into a 0.
        q = torch.where(large | x.isnan(), torch.sign(x) + x * 0.0, 0.0)
        return q.reshape(shape)

    def dequantize(
        self, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        shape = tuple(codes.shape)
        q = codes.float().reshape(matrix_shape(shape))
        x = q * spread(params["scales"], shape, self.group_size)
        return x.reshape(shape).to(dtype) + 0.0


def nearest_scales(magnitudes: Tensor, curvature: Tensor, start: Tensor | None = None) -> Tensor:
    """The α that minimises Σ d·(x − αb)² over α ≥ 0 and b in {−1, 0, 1}, last dimension by itself.

    At a minimum b is nonzero where |x| > α/2, and α is the mean of those |x|, weighted by d: so the
    nonzero entries are the k largest of some k, and k decides everything. ``start=None`` tries each
    k (LAT's exact solution, Hou & Kwok 2018, proposition 3.2, here by one sort). Else b and α are
    computed in turns from the α of ``start`` (their approximate solution), which may end in a
    local minimum and costs a fraction of the sort.

    Args:
        magnitudes: |x|, float ``[..., n]``.
        curvature: d ≥ 0, of that shape.
        start: ``[...]`` or ``None``.

    Returns:
        float64 ``[...]``; 0 where all of x, or all of d, is 0.
    """
    if not magnitudes.shape[-1]:
        return magnitudes.new_zeros(magnitudes.shape[:-1], dtype=torch.float64)
    if start is None:
        x, order = magnitudes.sort(dim=-1, descending=True)
        d = curvature.gather(-1, order).double()
        weighted, weights = (d * x).cumsum(-1), d.cumsum(-1)
        # The error of the k largest is Σ d·x² − weighted² / weights.
        gain = torch.where(weights > 0, weighted.square() / weights, 0.0)
        best = gain.argmax(-1, keepdim=True)
        return _ratio(weighted.gather(-1, best), weights.gather(-1, best)).squeeze(-1)
    alpha, large = start.double(), None
    for _ in range(_MAX_ROUNDS):
        before, large = large, magnitudes > alpha[..., None] / 2
        if before is not None and torch.equal(before, large):
            break
        d = torch.where(large, curvature, 0.0)
        alpha = _ratio(
            (d * magnitudes).sum(-1, dtype=torch.float64), d.sum(-1, dtype=torch.float64)
        )
    return alpha


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
