"""What a Winograd transform costs and what error it makes; chooses points and tiles by that.

Errors are statistical: independent roundings of relative standard deviation u/√6, u the unit
roundoff, for inputs and filters of independent, equal entries. ``tests/test_winograd_model.py``
compares the predictions with measurements. Bounds for the worst case, which grow alike, are in
Barabasz, Anderson, Soodhalter & Gregg 2020, "Error Analysis and Improving the Accuracy of Winograd
Convolution for Deep Neural Networks", ACM TOMS 46(4), arXiv 1803.10986.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from .winograd_transform import (
    INFINITY,
    SUPPORTED,
    Matrix,
    Transform,
    cook_toom,
    kernel_transform,
)

# tile="auto" takes no tile whose error is expected to be more times that of direct convolution.
MAX_ERROR_GROWTH = 8.0
# The CPU kernels add up products in blocks of so many channels; those of GPUs in blocks of 64.
SUM_BLOCK = 128
# oneDNN's direct convolution adds up all taps of so many channels, then those sums.
DIRECT_BLOCK = 16
# Of tiles of so many positions, the CUDA kernels keep the products on the multiprocessor.
FUSED_POSITIONS = 16
# Of few bits, so that float32 holds every entry of Aᵀ and Bᵀ.
CANDIDATES = tuple(Fraction(n, 8) for n in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24))
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}


# ---- operations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operations:
    """Of one matrix–vector product, with what pairs of points ±p share computed once.

    Attributes:
        multiplications: by anything but ±1.
        additions: and subtractions.
        instructions: with a multiplication and the addition that follows it fused.
    """

    multiplications: int
    additions: int
    instructions: int

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.multiplications + other.multiplications,
            self.additions + other.additions,
            self.instructions + other.instructions,
        )

    def __mul__(self, times: int) -> Operations:
        return Operations(
            self.multiplications * times, self.additions * times, self.instructions * times
        )


def operations(matrix: Matrix) -> Operations:
    """Count the operations of ``matrix @ vector``, any of the three of a :class:`Transform`.

    Rows of points ±p (in G and Bᵀ) are the sum and the difference of an even and an odd half;
    columns of them (in Aᵀ) enter even rows by their sum and odd rows by their difference.
    """
    by_rows = _operations_by_rows(matrix)
    by_columns = _operations_by_columns(matrix)
    return min(by_rows, by_columns, key=lambda o: (o.instructions, o.multiplications))


def _row_operations(coefficients: Sequence[Fraction]) -> Operations:
    sizes = [abs(c) for c in coefficients if c]
    n, ones = len(sizes), sum(size == 1 for size in sizes)
    if n == 0:
        return Operations(0, 0, 0)
    multiplications = 1 if len(set(sizes)) == 1 and not ones else n - ones
    return Operations(multiplications, n - 1, n - 1 + (ones == 0))


def _pair_operations(first: Sequence[Fraction], second: Sequence[Fraction]) -> Operations | None:
    """Of two rows that are even + odd and ±(even − odd); None where they are not."""
    for sign in (1, -1):
        pairs = [(a, sign * b) for a, b in zip(first, second, strict=True)]
        if any(abs(a) != abs(b) for a, b in pairs):
            continue
        even, odd = [a for a, b in pairs if a and a == b], [a for a, b in pairs if a and a != b]
        if not even or not odd:
            continue
        sizes = {abs(c) for c in even + odd}
        halves = _row_operations(even) + _row_operations(odd)
        multiplications = halves.multiplications
        if len(sizes) == 1 and sizes != {1}:
            multiplications = min(multiplications, 2)  # of the two results
        # The factor of one half joins the last additions, fused.
        instructions = min(
            _row_operations(one).instructions + len(other) - 1
            for one, other in ((even, odd), (odd, even))
        )
        return Operations(multiplications, halves.additions + 2, instructions + 2)
    return None


def _operations_by_rows(matrix: Matrix) -> Operations:
    total, rows = Operations(0, 0, 0), list(matrix)
    while rows:
        first = rows.pop(0)
        for at, second in enumerate(rows):
            pair = _pair_operations(first, second)
            if pair is not None:
                del rows[at]
                total += pair
                break
        else:
            total += _row_operations(first)
    return total


def _operations_by_columns(matrix: Matrix) -> Operations:
    columns = [list(column) for column in zip(*matrix, strict=True)]
    sums, total = [], Operations(0, 0, 0)
    while columns:
        first = columns.pop(0)
        for at, second in enumerate(columns):
            pairs = list(zip(first, second, strict=True))
            if all(abs(a) == abs(b) for a, b in pairs) and {a == b for a, b in pairs if a} == {
                True,
                False,
            }:
                del columns[at]
                total += Operations(0, 2, 2)
                sums.append([a if a == b else Fraction(0) for a, b in pairs])
                sums.append([a if a != b else Fraction(0) for a, b in pairs])
                break
        else:
            sums.append(first)
    for row in zip(*sums, strict=True):
        total += _row_operations(row)
    return total


@dataclass(frozen=True)
class TileOperations:
    """Of one tile, in one or two dimensions, for one input and one output channel.

    Attributes:
        direct: multiplications of the direct sum.
        products: multiplications in the Winograd domain.
        data, filter, inverse: of Bᵀ d B (once an input channel), G g Gᵀ (once for all tiles) and
            Aᵀ m A (once an output channel).
    """

    direct: int
    products: int
    data: Operations
    filter: Operations
    inverse: Operations


def tile_operations(transform: Transform, two_dimensional: bool = True) -> TileOperations:
    """Count what a tile takes; the matrices are applied to all columns, then to all rows."""
    m, r, alpha = transform.m, transform.r, transform.alpha
    if two_dimensional:
        return TileOperations(
            m**2 * r**2,
            alpha**2,
            operations(transform.bt) * (alpha + alpha),
            operations(transform.g) * (r + alpha),
            operations(transform.at) * (alpha + m),
        )
    return TileOperations(
        m * r, alpha, *(operations(matrix) for matrix in (transform.bt, transform.g, transform.at))
    )


# ---- errors --------------------------------------------------------------------------------------


class ErrorTerms(NamedTuple):
    """What of a transform the error depends on.

    Attributes:
        taps: r.
        amplification: how much more variance the terms of an output have than the output itself.
        roundings: of Bᵀ and Aᵀ, that a term is subject to on average.
        alpha: points.
    """

    taps: int
    amplification: float
    roundings: float
    alpha: int


# Of the dimension that a one-dimensional convolution does not have.
IDENTITY = ErrorTerms(1, 1.0, 0.0, 1)


def error_terms(transform: Transform) -> ErrorTerms:
    """Of one application to one dimension.

    Output i is Σ_j at[i][j] · (g_j · taps)(bt_j · inputs), whose terms have the variances
    at[i][j]² |g_j|² |bt_j|² and cancel down to r. Rounding errors of the terms do not cancel. The
    amplification is the mean over i; that of two dimensions is the product of both.
    """
    weights = [_squares(g) * _squares(bt) for g, bt in zip(transform.g, transform.bt, strict=True)]
    total = sum(
        float(a) ** 2 * weight
        for row in transform.at
        for a, weight in zip(row, weights, strict=True)
    )
    # A sum of n terms, one by one: the k-th rounding is of k / n of its variance.
    roundings = sum(
        sum(1 for row in matrix for value in row if value) / len(matrix) / 2
        for matrix in (transform.bt, transform.at)
    )
    amplification = total / transform.m / transform.r
    return ErrorTerms(transform.r, amplification, roundings, transform.alpha)


def _squares(row: Iterable[Fraction]) -> float:
    return sum(float(value) ** 2 for value in row)


def _summed(terms: int, block: int) -> float:
    """Roundings of a sum of so many products, made in blocks and then of the blocks."""
    return (min(terms, block) + 1) / 2 + (math.ceil(terms / block) - 1) / 2


def relative_error(down: ErrorTerms, across: ErrorTerms, channels: int) -> float:
    """Expected RMS error over RMS output of a Winograd convolution, in unit roundoffs.

    Args:
        down, across: of height and width; ``IDENTITY`` where there is only one.
        channels: input channels a group.
    """
    roundings = _summed(max(channels, 1), SUM_BLOCK) + down.roundings + across.roundings
    roundings += 1  # of the transformed filter
    return math.sqrt(down.amplification * across.amplification * roundings / 6)


def direct_error(taps: int, channels: int) -> float:
    """The same of direct convolution with so many taps, as oneDNN sums it."""
    channels = max(channels, 1)
    block = taps * min(channels, DIRECT_BLOCK)
    return math.sqrt(_summed(taps * channels, block) / 6)


def error_growth(
    down: ErrorTerms,
    across: ErrorTerms,
    channels: int,
    dtype: str = "float32",
    half_domain: bool = False,
) -> float:
    """Expected RMS error as a multiple of that of direct convolution in the same dtype.

    Args:
        down, across, channels: as of :func:`relative_error`.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"`` (all summed in float32), ``"float64"``.
        half_domain: the transformed input and weights are rounded to that dtype, as tensor cores
            take them, and the products of more than ``FUSED_POSITIONS`` positions to float16, as
            the CUDA kernels store them; the CPU kernels keep all in float32.
    """
    unit = UNIT_ROUNDOFF[dtype]
    summed = min(unit, UNIT_ROUNDOFF["float32"])
    winograd = (relative_error(down, across, channels) * summed) ** 2
    direct = (direct_error(down.taps * across.taps, channels) * summed) ** 2
    if unit > summed:
        one = unit**2 / 6
        direct += one
        winograd += one
        if half_domain:
            roundings = 2 * one
            if down.alpha * across.alpha > FUSED_POSITIONS:
                roundings += UNIT_ROUNDOFF["float16"] ** 2 / 6
            winograd += down.amplification * across.amplification * roundings
    return math.sqrt(winograd / direct)


def choose_points(
    m: int, r: int, candidates: Sequence[Fraction] = CANDIDATES
) -> tuple[Fraction | float, ...]:
    """The points of F(m, r) with the least amplification: 0, pairs ±p, and infinity.

    Args:
        m, r: as of :func:`~.winograd_transform.cook_toom`; m + r is odd.
        candidates: positive rationals to take p from.

    Raises:
        ValueError: m + r is even, or there are not enough candidates.
    """
    pairs, rest = divmod(m + r - 3, 2)
    if rest or pairs < 0 or len(candidates) < pairs:
        raise ValueError(
            f"choose_points: arguments 'm' and 'r' must have an odd sum from 3 on that "
            f"{len(candidates)} candidates suffice for, got {m} and {r}"
        )

    def points(sizes: Sequence[Fraction]) -> tuple[Fraction | float, ...]:
        return (Fraction(0), *(sign * p for p in sizes for sign in (1, -1)), INFINITY)

    return min(
        (points(sizes) for sizes in itertools.combinations(candidates, pairs)),
        key=lambda chosen: error_terms(cook_toom(m, r, chosen)).amplification,
    )


# ---- the choice of a tile ------------------------------------------------------------------------

# Times of the CPU kernel, in multiply–accumulates of its matrix product, fitted to 20 layers of 3
# to 512 channels (within 15 % where the weights stay in cache): to transform one value on the way
# in or out of the Winograd domain, and to read a weight once.
_IN, _OUT, _WEIGHT = 7.5, 10.0, 4.0


# Plain numbers, which torch.compile can trace.
_TERMS = {pair: error_terms(kernel_transform(*pair)) for pair in SUPPORTED}


def estimate(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tile: int,
) -> float:
    """The time of a ``winograd_conv2d``, in multiply–accumulates; for comparing tiles."""
    N, C, H, W = x_shape
    K, _, rh, r = weight_shape
    rows, positions = H + 2 * padding[0] - rh + 1, tile + r - 1
    if rh > 1:
        rows, positions = -(-rows // tile), positions**2
    tiles = N * rows * -(-(W + 2 * padding[1] - r + 1) // tile)
    weights = K * C // groups
    return positions * (weights * (tiles + _WEIGHT) + tiles * (C * _IN + K * _OUT))


def allowed_tiles(
    r: int, one_dimensional: bool, channels: int, dtype: str, half_domain: bool
) -> list[int]:
    """The tiles whose error grows by no more than ``MAX_ERROR_GROWTH``, else the most exact one."""
    growth = {}
    for (tile, taps), across in _TERMS.items():
        if taps == r:
            down = IDENTITY if one_dimensional else across
            growth[tile] = error_growth(down, across, channels, dtype, half_domain)
    least = min(growth.values())
    return [tile for tile in growth if growth[tile] <= max(MAX_ERROR_GROWTH, least)]


def choose_tile(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    *,
    dtype: str = "float32",
    half_domain: bool = False,
) -> int:
    """The tile that ``winograd_conv2d`` takes for ``tile="auto"``.

    Of :func:`allowed_tiles` the one with the least :func:`estimate`.

    Args:
        x_shape, weight_shape: ``[N, C, H, W]`` and ``[K, C / groups, rh, r]``.
        padding, groups: of the convolution.
        dtype, half_domain: as in :func:`error_growth`.

    Raises:
        ValueError: no tile takes the kernel; the message names its size.
    """
    rh, r = weight_shape[2:]
    if all(taps != r for _, taps in SUPPORTED):
        raise ValueError(f"choose_tile: argument 'weight_shape' must be 3, 5 or 7 wide, got {r}")
    # int: sizes that are symbolic in a graph.
    tiles = allowed_tiles(int(r), bool(rh == 1), int(weight_shape[1]), dtype, half_domain)
    chosen, least = tiles[0], math.inf
    for tile in tiles:  # torch.compile knows no min with a key
        time = estimate(x_shape, weight_shape, padding, groups, tile)
        if time < least:
            chosen, least = tile, time
    return chosen
