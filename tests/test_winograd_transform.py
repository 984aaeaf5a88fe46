"""Cook–Toom transforms: the published matrices, and the identity itself in exact rationals."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressops.ops.winograd_transform import (
    INFINITY,
    INFINITY_SIGNS,
    POINTS,
    SUPPORTED,
    Transform,
    cook_toom,
    default_points,
    identity_transform,
    kernel_transform,
)

INTEGERS = (0, 1, -1, 2, -2, INFINITY)
HALVES = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2), INFINITY)


def rows(text: str) -> tuple[tuple[Fraction, ...], ...]:
    return tuple(tuple(Fraction(word) for word in line.split()) for line in text.split(","))


# Lavin & Gray 2015, section 4.1; wincnn has the last row of Bᵀ, and −1 in Aᵀ, negated.
F23 = (
    rows("1 1 1 0, 0 1 -1 -1"),
    rows("1 0 0, 1/2 1/2 1/2, 1/2 -1/2 1/2, 0 0 1"),
    rows("1 0 -1 0, 0 1 1 0, 0 -1 1 0, 0 1 0 -1"),
)
# Lavin & Gray 2015, section 4.3.
F43 = (
    rows("1 1 1 1 1 0, 0 1 -1 2 -2 0, 0 1 1 4 4 0, 0 1 -1 8 -8 1"),
    rows("1/4 0 0, -1/6 -1/6 -1/6, -1/6 1/6 -1/6, 1/24 1/12 1/6, 1/24 -1/12 1/6, 0 0 1"),
    rows("4 0 -5 0 1 0, 0 -4 -4 1 1 0, 0 4 -4 -1 1 0,0 -2 -1 2 1 0, 0 2 -1 -2 1 0, 0 4 0 -5 0 1"),
)
# The matrices of F(6, 3) that wincnn, NNPACK, ncnn and oneDNN print.
F63 = (
    rows(
        "1 1 1 1 1 1 1 0, 0 1 -1 2 -2 1/2 -1/2 0, 0 1 1 4 4 1/4 1/4 0,"
        "0 1 -1 8 -8 1/8 -1/8 0, 0 1 1 16 16 1/16 1/16 0, 0 1 -1 32 -32 1/32 -1/32 1"
    ),
    rows(
        "1 0 0, -2/9 -2/9 -2/9, -2/9 2/9 -2/9, 1/90 1/45 2/45, 1/90 -1/45 2/45,"
        "32/45 16/45 8/45, 32/45 -16/45 8/45, 0 0 1"
    ),
    rows(
        "1 0 -21/4 0 21/4 0 -1 0, 0 1 1 -17/4 -17/4 1 1 0, 0 -1 1 17/4 -17/4 -1 1 0,"
        "0 1/2 1/4 -5/2 -5/4 2 1 0, 0 -1/2 1/4 5/2 -5/4 -2 1 0,"
        "0 2 4 -5/2 -5 1/2 1 0, 0 -2 4 5/2 -5 -1/2 1 0, 0 -1 0 21/4 0 -21/4 0 1"
    ),
)


@pytest.mark.parametrize(
    ("transform", "published"),
    [
        pytest.param(cook_toom(2, 3, (0, 1, -1, INFINITY), infinity_sign=-1), F23, id="F(2,3)"),
        pytest.param(cook_toom(4, 3, INTEGERS), F43, id="F(4,3)"),
        pytest.param(cook_toom(6, 3, HALVES), F63, id="F(6,3)"),
        pytest.param(kernel_transform(2, 3), F23, id="kernel F(2,3)"),
        pytest.param(kernel_transform(6, 3), F63, id="kernel F(6,3)"),
    ],
)
def test_published_matrices(transform: Transform, published: tuple) -> None:
    assert (transform.at, transform.g, transform.bt) == published


def test_matrices_of_the_kernels_for_alpha_6() -> None:
    p, q = Fraction(5, 8), Fraction(3, 2)
    both, product = p * p + q * q, p * p * q * q
    expected = (
        (product, 0, -both, 0, 1, 0),
        *((0, -s * p * q * q, -q * q, s * p, 1, 0) for s in (1, -1)),
        *((0, -s * q * p * p, -p * p, s * q, 1, 0) for s in (1, -1)),
        (0, product, 0, -both, 0, 1),
    )
    for tile, r in ((4, 3), (2, 5)):
        transform = kernel_transform(tile, r)
        assert transform.bt == expected
        for i, row in enumerate(transform.at):
            assert row == (0**i, p**i, (-p) ** i, q**i, (-q) ** i, int(i == tile - 1))


def convolve(transform: Transform, data: list[Fraction], taps: list[Fraction]) -> list[Fraction]:
    def apply(matrix, vector):
        return [
            sum((a * b for a, b in zip(row, vector, strict=True)), Fraction()) for row in matrix
        ]

    products = zip(apply(transform.g, taps), apply(transform.bt, data), strict=True)
    return apply(transform.at, [a * b for a, b in products])


def direct(data: list[Fraction], taps: list[Fraction]) -> list[Fraction]:
    r = len(taps)
    return [
        sum((data[i + k] * taps[k] for k in range(r)), Fraction()) for i in range(len(data) - r + 1)
    ]


def assert_is_bilinear_algorithm(transform: Transform) -> None:
    """The identity on all pairs of unit vectors, and so, being bilinear, on everything."""
    m, r, alpha = transform.m, transform.r, transform.alpha
    assert alpha == m + r - 1
    for k in range(r):
        taps = [Fraction(int(i == k)) for i in range(r)]
        for j in range(alpha):
            data = [Fraction(int(i == j)) for i in range(alpha)]
            assert convolve(transform, data, taps) == direct(data, taps), (k, j)


@pytest.mark.parametrize("r", range(1, 8))
@pytest.mark.parametrize("m", range(1, 9))
def test_identity_for_any_size(m: int, r: int) -> None:
    assert_is_bilinear_algorithm(cook_toom(m, r))


@pytest.mark.parametrize(("tile", "r"), SUPPORTED)
def test_identity_of_the_kernels_transforms(tile: int, r: int) -> None:
    transform = kernel_transform(tile, r)
    assert_is_bilinear_algorithm(transform)
    assert transform.points == POINTS[transform.alpha]
    # The kernels share Bᵀ among all r of an alpha, and Aᵀ and Bᵀ lose nothing in float32.
    first = next(pair for pair in SUPPORTED if sum(pair) == tile + r)
    assert transform.bt == kernel_transform(*first).bt
    for value in (v for row in transform.at + transform.bt for v in row):
        assert Fraction(float(value)) == value
        assert value.denominator & (value.denominator - 1) == 0
        assert value.numerator.bit_length() <= 24
    assert transform.at[-1][-1] == INFINITY_SIGNS.get(transform.alpha, 1)


def test_identity_transform() -> None:
    one = ((Fraction(1),),)
    transform = identity_transform()
    assert (transform.m, transform.r, transform.alpha) == (1, 1, 1)
    assert (transform.at, transform.g, transform.bt) == (one, one, one)


rationals = st.fractions(min_value=-4, max_value=4, max_denominator=9)


@given(st.data(), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_identity_on_random_points_and_polynomials(data, m: int, r: int, infinite: bool) -> None:
    alpha = m + r - 1
    finite = alpha - int(infinite)
    points = data.draw(st.lists(rationals, min_size=finite, max_size=finite, unique=True))
    sign = data.draw(st.sampled_from((1, -1)))
    transform = cook_toom(m, r, [*points, *([INFINITY] * infinite)], infinity_sign=sign)
    taps = data.draw(st.lists(rationals, min_size=r, max_size=r))
    inputs = data.draw(st.lists(rationals, min_size=alpha, max_size=alpha))
    assert convolve(transform, inputs, taps) == direct(inputs, taps)


def test_default_points() -> None:
    for alpha in range(1, 14):
        points = default_points(alpha)
        assert len(points) == alpha == len(set(points))
        assert points[-1] == INFINITY
    half = Fraction(1, 2)
    assert default_points(9) == (0, 1, -1, 2, -2, half, -half, 3, INFINITY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cook_toom(0, 3), "argument 'm' must be at least 1, got 0"),
        (lambda: cook_toom(2, -1), "argument 'r' must be at least 1, got -1"),
        (lambda: cook_toom(2, 3, (0, 1, -1)), r"'points' must be 4 .* got \(0, 1, -1\)"),
        (lambda: cook_toom(2, 3, (0, INFINITY, 1, -1)), r"'points' must be 4 .* got \(0, inf"),
        (
            lambda: cook_toom(2, 3, (0, 1, float("nan"), 2)),
            r"'points' must be 4 .* got \(0, 1, nan",
        ),
        (lambda: cook_toom(2, 3, (0, 1, 1.0, INFINITY)), r"different .* got \(0, 1, 1.0, inf\)"),
        (lambda: cook_toom(2, 3, infinity_sign=0), "argument 'infinity_sign' must be ±1, got 0"),
        (lambda: default_points(0), "argument 'alpha' must be positive, got 0"),
        (lambda: kernel_transform(3, 3), r"kernels for F\(2, 3\), .*, not for F\(3, 3\)"),
    ],
)
def test_bad_arguments_are_named_with_their_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
