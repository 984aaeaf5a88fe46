"""Factors of weights: truncated singular value decompositions, and tensorly's Tucker and CP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressops.formats.lowrank import LowRank
from compressops.formats.number import matrix_shape

# Alternating steps at most; both stop before, where the error falls no more.
_TUCKER_STEPS = 50
_CP_STEPS = 200
# Of the largest eigenvalue of what columns of a kernel see, the least that is believed.
_LEAST_SHIFT = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """A basis of a matrix's columns, the best for each rank first. It is orthonormal, unless
    ``dual`` says what it is orthonormal to.

    Attributes:
        basis: float64 ``[rows, n]``.
        values: float64 ``[n]``, falling: rank r leaves the error ``values[r:].square().sum()``.
        dual: float64 ``[rows, n]``, ``dual.T @ basis`` is 1; ``None``: the basis.
    """

    basis: Tensor
    values: Tensor
    dual: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """The left singular vectors and the singular values."""
        matrix = matrix.detach().double()
        if matrix.shape[1] > matrix.shape[0]:
            # R of a long matrix has its singular vectors, and few columns.
            matrix = torch.linalg.qr(matrix.mT, mode="r").R.mT
        basis, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return cls(basis, values)

    @classmethod
    def of_outputs(cls, moment: Tensor) -> Spectrum:
        """Of outputs ``Y [rows, samples]`` with the second moment ``Y @ Y.T`` ``[rows, rows]``."""
        squares, basis = torch.linalg.eigh(moment.detach().double())
        return cls(basis.flip(1), squares.flip(0).clamp(min=0).sqrt())

    @classmethod
    def of_columns(cls, weight: Tensor, patches: Tensor, shifts: Tensor) -> Spectrum:
        """Of the outputs that ``unfolded("spatial", weight)`` gives.

        An output is a sum over the kernel's columns a, of M_a times the patch of the input below
        a. Where the second moment of the patches of columns a and b is K_ab · C, the squared error
        of the outputs is ‖(K^½ ⊗ 1) (M − U V) C^½‖², of which a truncated singular value
        decomposition is the least: the basis B of (K^½ ⊗ 1) M C^½ gives U = (K^-½ ⊗ 1) B and
        V = Bᵀ (K^½ ⊗ 1) M.

        Args:
            weight: ``[O, I, h, w]``.
            patches: C ``[I·h, I·h]``.
            shifts: K ``[w, w]``.
        """
        squares, vectors = torch.linalg.eigh(shifts.detach().double())
        # Columns that see the same (of constant images) have no inverse.
        squares = squares.clamp(min=squares[-1].clamp(min=1e-30) * _LEAST_SHIFT)
        roots = [vectors * squares.pow(power) @ vectors.mT for power in (0.5, -0.5)]
        out, columns = weight.shape[0], len(shifts)

        def mixed(root: Tensor, matrix: Tensor) -> Tensor:
            parts = matrix.view(out, columns, -1)
            return torch.einsum("ab,obn->oan", root, parts).reshape(out * columns, -1)

        matrix = mixed(roots[0], unfolded("spatial", weight).double().contiguous())
        found = cls.of_outputs(matrix @ patches.double() @ matrix.mT)
        return cls(mixed(roots[1], found.basis), found.values, mixed(roots[0], found.basis))

    def projection(self, rank: int) -> tuple[Tensor, Tensor]:
        """``P [rows, rank]``, ``Q [rank, rows]``: ``P @ Q @ matrix`` is the best of that rank."""
        dual = self.basis if self.dual is None else self.dual
        return self.basis[:, :rank], dual[:, :rank].mT

    def errors(self) -> Tensor:
        """Relative squared error of each rank from 0 to n, ``[n + 1]``."""
        squares = self.values.square()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return tails / tails[0].clamp(min=torch.finfo(torch.float64).tiny)


def unfolded(form: str, weight: Tensor) -> Tensor:
    """The matrix whose rank a form of two factors bounds: ``[O, I·h·w]`` of ``"matrix"``,
    ``[O·w, I·h]`` of ``"spatial"``."""
    if form == "matrix":
        return weight.detach().reshape(matrix_shape(tuple(weight.shape)))
    o, i, h, w = weight.shape
    return weight.detach().permute(0, 3, 1, 2).reshape(o * w, i * h)


def decompose(layout: LowRank, weight: Tensor, spectrum: Spectrum | None = None) -> list[Tensor]:
    """Factors of ``weight``, in its dtype, of `LowRank.factor_shapes`.

    ``"matrix"`` and ``"spatial"`` are the best in the least-squares sense (Eckart & Young 1936).
    ``"tucker"`` is tensorly's `partial_tucker` (higher-order orthogonal iteration, De Lathauwer et
    al. 2000), ``"cp"`` its `parafac` (alternating least squares); both find a local optimum.

    Args:
        layout: the form and its rank.
        weight: float, a matrix or ``[O, I, h, w]``.
        spectrum: of ``unfolded(form, weight)``, or of the layer's outputs: the factors are then the
            best for those, ``‖(W − U V) X‖`` least, because ``U = basis`` and ``V = basis.T @ W``
            project the outputs (``V = dual.T @ W`` where there is a dual). ``None``: of the weight.

    Raises:
        ImportError: ``"tucker"`` and ``"cp"`` need tensorly.
        ValueError: the weight has no such rank, or holds NaN or infinities.
    """
    shapes = layout.factor_shapes(tuple(weight.shape))
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds NaN or infinite values")
    if layout.form in ("tucker", "cp"):
        factors = (_tucker if layout.form == "tucker" else _cp)(layout, weight)
    else:
        matrix = unfolded(layout.form, weight).double()
        spectrum = spectrum or Spectrum.of(matrix)
        u, v = spectrum.projection(layout.rank)
        factors = _balanced(u.to(matrix.device), v.to(matrix.device) @ matrix)
        if layout.form == "spatial":
            o, r, _, w = shapes["u"]
            factors[0] = factors[0].view(o, w, r).transpose(1, 2)
    return [
        factor.to(weight.dtype).reshape(shape).contiguous()
        for factor, shape in zip(factors, shapes.values(), strict=True)
    ]


def _balanced(u: Tensor, v: Tensor) -> list[Tensor]:
    """The same product, with columns of U and rows of V of one norm: neither then asks for a
    wider range of a number than the other."""
    lengths = u.norm(dim=0), v.norm(dim=1)
    scale = (lengths[1] / lengths[0]).sqrt()
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return [u * scale, v / scale[:, None]]


def _tucker(layout: LowRank, weight: Tensor) -> list[Tensor]:
    tensorly = _tensorly()
    array = weight.detach().double().cpu().numpy()
    with tensorly.backend_context("numpy"):
        (core, (u, v)), _ = tensorly.decomposition.partial_tucker(
            array,
            rank=list(layout.rank),
            modes=[0, 1],
            n_iter_max=_TUCKER_STEPS,
            init="svd",
            tol=1e-8,
        )
    u, core, v = (torch.from_numpy(part.copy()).to(weight.device) for part in (u, core, v))
    # The core has the size of the weight, the others are orthonormal: a third of it to each.
    (p, q), scale = layout.rank, core.norm() or core.new_ones(())
    outer = (scale / core.numel() ** 0.5) ** (1 / 3)
    parts = u * (p**0.5), v.mT * (q**0.5)
    outer = torch.where(outer > 0, outer, 1.0)
    return [parts[0] * outer, core / (outer.square() * (p * q) ** 0.5), parts[1] * outer]


def _cp(layout: LowRank, weight: Tensor) -> list[Tensor]:
    tensorly = _tensorly()
    array = weight.detach().double().flatten(2).cpu().numpy()
    small = layout.rank <= min(array.shape)
    with tensorly.backend_context("numpy"):
        weights, parts = tensorly.decomposition.parafac(
            array,
            rank=layout.rank,
            n_iter_max=_CP_STEPS,
            # Singular vectors of the shortest mode are fewer than such a rank.
            init="svd" if small else "random",
            random_state=0,
            tol=1e-8,
            normalize_factors=True,
        )
    u, v, core = (torch.from_numpy(part.copy()).to(weight.device) for part in parts)
    scale = torch.from_numpy(weights.copy()).to(weight.device).clamp(min=0) ** (1 / 3)
    return [u * scale, (core * scale).mT, (v * scale).mT]


def _tensorly():
    try:
        import tensorly
        import tensorly.decomposition
    except ImportError as error:
        raise ImportError(
            "forms 'tucker' and 'cp' need tensorly: pip install compressops[lowrank]"
        ) from error
    return tensorly
