"""Cook–Toom transforms of a convolution F(m, r), in exact rationals.

``y = Aᵀ[(G g) ⊙ (Bᵀ d)]`` gives m outputs ``y[i] = Σ_k d[i + k] · g[k]`` of an r-tap filter g from
alpha = m + r − 1 inputs d with alpha multiplications instead of m·r (Winograd 1980; Lavin & Gray
2015, arXiv 1509.09308). Two-dimensional transforms are this one nested with itself.

The polynomial g(x)·h(x), of degree alpha − 1, is determined by its values at alpha points p: these
are products of the values of g (the rows of G) and of h (the columns of Aᵀ), and Lagrange's formula
gives back the coefficients. F(m, r) is the transpose of that, so Bᵀ holds Lagrange's numerators and
G takes their denominators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

INFINITY = math.inf
Point = Fraction | float
Matrix = tuple[tuple[Fraction, ...], ...]

# The points of the kernels, by alpha. Those of alpha = 6 are not the 0, ±1, ±2, ∞ of the
# literature: with these the errors are about half (docs/WINOGRAD.md). All are exact in binary.
POINTS: dict[int, tuple[Point, ...]] = {
    4: (Fraction(0), Fraction(1), Fraction(-1), INFINITY),
    6: (
        *(Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
        INFINITY,
    ),
    8: (
        *(Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2)),
        *(Fraction(1, 2), Fraction(-1, 2), INFINITY),
    ),
}
# Lavin & Gray write F(2, 3) with the point at infinity negated, and the kernels follow.
INFINITY_SIGNS = {4: -1}
# (tile, r) that the kernels of winograd_conv2d take.
SUPPORTED = ((2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (2, 7))


@dataclass(frozen=True)
class Transform:
    """F(m, r): ``y = at @ ((g_matrix @ g) * (bt @ d))``.

    Attributes:
        points: the alpha interpolation points, ``INFINITY`` last if it is one of them.
        at: Aᵀ ``[m][alpha]``, from products to outputs.
        g: G ``[alpha][r]``, from the filter.
        bt: Bᵀ ``[alpha][alpha]``, from the input. It does not depend on m and r apart.
    """

    points: tuple[Point, ...]
    at: Matrix
    g: Matrix
    bt: Matrix

    @property
    def m(self) -> int:
        """Outputs."""
        return len(self.at)

    @property
    def r(self) -> int:
        """Filter taps."""
        return len(self.g[0])

    @property
    def alpha(self) -> int:
        """Inputs, and multiplications: m + r − 1."""
        return len(self.bt)


def default_points(alpha: int) -> tuple[Point, ...]:
    """``POINTS[alpha]`` or, for other alpha, 0, ±1, ±2, ±1/2, ±3, ±1/3, … and infinity last.

    Raises:
        ValueError: alpha is not positive.
    """
    if alpha < 1:
        raise ValueError(f"default_points: argument 'alpha' must be positive, got {alpha}")
    if alpha in POINTS:
        return POINTS[alpha]
    finite = [Fraction(0), Fraction(1), Fraction(-1)]
    for size in range(2, alpha):
        finite += [Fraction(sign * v) for v in (size, Fraction(1, size)) for sign in (1, -1)]
    return (*finite[: alpha - 1], INFINITY)


def cook_toom(
    m: int, r: int, points: Sequence[int | Point] | None = None, infinity_sign: int = 1
) -> Transform:
    """The transform F(m, r) on interpolation points.

    With L_j(x) = Π (x − p_k) over the other finite points, ``at[i][j] = p_j^i``, ``g[j][i] = p_j^i
    / L_j(p_j)``, and ``bt[j]`` holds the coefficients of L_j, lowest first. Infinity counts for the
    highest coefficients alone. The row of the point 0 is negated in G and Bᵀ where that makes it
    positive in G; with that, F(2, 3), F(4, 3) and F(6, 3) are the published matrices.

    Args:
        m: outputs, at least 1.
        r: filter taps, at least 1.
        points: m + r − 1 different rationals, the last of which may be ``INFINITY``.
            Default: :func:`default_points`.
        infinity_sign: −1 negates the point at infinity in Aᵀ and Bᵀ, as in Lavin & Gray's F(2, 3).

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    for name, value in (("m", m), ("r", r)):
        if value < 1:
            raise ValueError(f"cook_toom: argument '{name}' must be at least 1, got {value}")
    if infinity_sign not in (1, -1):
        raise ValueError(f"cook_toom: argument 'infinity_sign' must be ±1, got {infinity_sign}")
    alpha = m + r - 1
    points = default_points(alpha) if points is None else tuple(points)
    has_infinity = len(points) > 0 and points[-1] == INFINITY
    finite_points = points[:-1] if has_infinity else points
    if len(points) != alpha or any(not math.isfinite(p) for p in finite_points):
        raise ValueError(
            f"cook_toom: argument 'points' must be {alpha} = m + r − 1 rationals, the last of "
            f"which may be infinity, got {_names(points)}"
        )
    finite = [Fraction(p) for p in finite_points]
    if len(set(finite)) != len(finite):
        raise ValueError(
            f"cook_toom: argument 'points' must be different from one another, got {_names(points)}"
        )

    at = [[p**i for p in finite] for i in range(m)]
    g, bt = [], []
    for j, p in enumerate(finite):
        row = _from_roots([*finite[:j], *finite[j + 1 :]])
        denominator = _evaluate(row, p)
        if p == 0 and denominator < 0:
            row, denominator = [-c for c in row], -denominator
        bt.append(row + [Fraction(0)] * (alpha - len(row)))
        g.append([p**i / denominator for i in range(r)])
    if has_infinity:
        for i, row in enumerate(at):
            row.append(Fraction(infinity_sign if i == m - 1 else 0))
        g.append([Fraction(int(i == r - 1)) for i in range(r)])
        bt.append([infinity_sign * c for c in _from_roots(finite)])
        finite = [*finite, INFINITY]
    return Transform(tuple(finite), _frozen(at), _frozen(g), _frozen(bt))


@functools.cache
def kernel_transform(tile: int, r: int) -> Transform:
    """The transform F(tile, r) that the kernels of ``winograd_conv2d`` compute.

    Raises:
        ValueError: there are no kernels for it; the message lists those that there are.
    """
    if (tile, r) not in SUPPORTED:
        listed = ", ".join(f"F({m}, {taps})" for m, taps in SUPPORTED)
        raise ValueError(f"winograd: there are kernels for {listed}, not for F({tile}, {r})")
    alpha = tile + r - 1
    return cook_toom(tile, r, POINTS[alpha], INFINITY_SIGNS.get(alpha, 1))


@functools.cache
def identity_transform() -> Transform:
    """F(1, 1), which does nothing: the other dimension of a one-dimensional convolution."""
    return cook_toom(1, 1, (Fraction(0),))


def _names(points: Sequence[Point]) -> str:
    return "(" + ", ".join(str(p) for p in points) + ")"


def _from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of Π (x − root), lowest first."""
    out = [Fraction(1)]
    for root in roots:
        shifted, same = [Fraction(0), *out], [*out, Fraction(0)]
        out = [high - root * low for high, low in zip(shifted, same, strict=True)]
    return out


def _evaluate(coefficients: Sequence[Fraction], x: Fraction) -> Fraction:
    return sum((c * x**i for i, c in enumerate(coefficients)), Fraction(0))


def _frozen(rows: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(tuple(row) for row in rows)
