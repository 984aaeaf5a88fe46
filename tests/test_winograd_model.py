"""The cost and error model: counted by hand, in the literature, and measured."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from winograd_cases import measured_growth

import compressops as co
from compressops.ops import winograd_model as model
from compressops.ops.winograd_model import Operations
from compressops.ops.winograd_transform import (
    INFINITY,
    POINTS,
    SUPPORTED,
    Matrix,
    cook_toom,
    identity_transform,
    kernel_transform,
)

INTEGERS = (0, 1, -1, 2, -2, INFINITY)


def test_the_textbook_example() -> None:
    counted = model.tile_operations(kernel_transform(2, 3), two_dimensional=False)
    assert (counted.direct, counted.products) == (6, 4)
    # (d0 − d2), (d1 + d2), (d2 − d1), (d1 − d3); (g0 + g2 ± g1) / 2; m0 + m1 + m2, m1 − m2 − m3.
    assert counted.data == Operations(0, 4, 4)
    assert (counted.filter.multiplications, counted.filter.additions) == (2, 3)
    assert counted.inverse == Operations(0, 4, 4)


def test_counts_of_the_literature() -> None:
    """Lavin & Gray 2015, sections 4.1 and 4.3: floating point instructions."""
    counted = model.tile_operations(kernel_transform(2, 3))
    assert (counted.direct, counted.products) == (36, 16)
    instructions = (counted.data.instructions, counted.filter.instructions)
    assert (*instructions, counted.inverse.instructions) == (32, 28, 24)
    counted = model.tile_operations(cook_toom(4, 3, INTEGERS))
    assert (counted.direct, counted.products) == (144, 36)
    assert (counted.data.instructions, counted.inverse.instructions) == (144, 100)


def test_identity_costs_nothing() -> None:
    for matrix in (identity_transform().at, identity_transform().g, identity_transform().bt):
        assert model.operations(matrix) == Operations(0, 0, 0)


def row_by_row(matrix: Matrix) -> tuple[int, int]:
    entries = [value for row in matrix for value in row if value]
    return sum(abs(v) != 1 for v in entries), len(entries) - len(matrix)


@pytest.mark.parametrize(("tile", "r"), SUPPORTED)
def test_sharing_saves_operations(tile: int, r: int) -> None:
    transform = kernel_transform(tile, r)
    for matrix in (transform.bt, transform.g, transform.at):
        counted = model.operations(matrix)
        multiplications, additions = row_by_row(matrix)
        assert counted.multiplications <= multiplications
        assert counted.additions <= additions
        assert counted.instructions >= max(counted.additions, counted.multiplications)
    # What csrc/cpu/winograd_conv2d_simd.h executes, with a product and a sum in one instruction.
    data = {4: 4, 6: 12, 8: 24}[transform.alpha]
    assert model.operations(transform.bt).instructions == data


@pytest.mark.parametrize(("tile", "r"), SUPPORTED)
def test_the_points_of_the_kernels_are_those_that_the_model_chooses(tile: int, r: int) -> None:
    assert set(model.choose_points(tile, r)) == set(POINTS[tile + r - 1])


def test_choose_points_asks_for_what_it_can_do() -> None:
    with pytest.raises(ValueError, match=r"'m' and 'r' must have an odd sum .* got 3 and 3"):
        model.choose_points(3, 3)
    with pytest.raises(ValueError, match="2 candidates suffice for, got 6 and 3"):
        model.choose_points(6, 3, [Fraction(1), Fraction(2)])


def test_amplification_does_not_depend_on_order_and_signs() -> None:
    expected = model.error_terms(cook_toom(4, 3, INTEGERS)).amplification
    for sign, points in itertools.product((1, -1), itertools.permutations((0, 2, -2, 1), 4)):
        terms = model.error_terms(cook_toom(4, 3, (*points, -1, INFINITY), sign))
        assert terms.amplification == pytest.approx(expected)


@pytest.mark.parametrize("flat", [False, True], ids=("2d", "1d"))
@pytest.mark.parametrize(("tile", "r"), SUPPORTED)
def test_predicted_error_is_the_measured_one(tile: int, r: int, flat: bool) -> None:
    across = model.error_terms(kernel_transform(tile, r))
    down = model.IDENTITY if flat else across
    for channels in (16, 64, 200):
        measured = measured_growth(tile, r, torch.float32, channels, flat=flat)
        predicted = model.relative_error(down, across, channels)
        print(f"\n{channels}: {measured.relative:.2f} u, predicted {predicted:.2f} u", end="")
        assert measured.relative == pytest.approx(predicted, rel=0.3)
        # How torch sums is its own affair: its error is predicted less well.
        growth = model.error_growth(down, across, channels)
        assert growth / 2 < measured.rms < growth * 2


def test_predicted_error_of_other_points() -> None:
    """Of F(4, 3) on 0, ±1, ±2, ∞, in float32 through float64 matrices."""
    channels, tiles = 64, 4000
    transform = cook_toom(4, 3, INTEGERS)
    at, g, bt = (
        torch.tensor([[float(v) for v in row] for row in matrix])
        for matrix in (transform.at, transform.g, transform.bt)
    )
    data, taps = torch.randn(tiles, channels, 6, 6), torch.randn(channels, 3, 3)

    def run(dtype: torch.dtype) -> torch.Tensor:
        u = (g.double() @ taps.double() @ g.double().t()).to(dtype)
        v = bt.to(dtype) @ data.to(dtype) @ bt.to(dtype).t()
        sums = torch.zeros(tiles, 6, 6, dtype=dtype)
        for c in range(channels):
            sums += u[c] * v[:, c]
        return at.to(dtype) @ sums @ at.to(dtype).t()

    exact = run(torch.float64)
    error = (run(torch.float32) - exact).square().mean() / exact.square().mean()
    measured = error.sqrt().item() * 2**24
    integers = model.error_terms(transform)
    assert measured == pytest.approx(model.relative_error(integers, integers, channels), rel=0.4)
    ours = model.error_terms(kernel_transform(4, 3))
    assert model.relative_error(integers, integers, 64) > 2.2 * model.relative_error(ours, ours, 64)


def test_half_precision() -> None:
    terms = {pair: model.error_terms(kernel_transform(*pair)) for pair in SUPPORTED}
    for pair, t in terms.items():
        # float32 inside: the rounding of the result is all the error.
        assert model.error_growth(t, t, 64, "float16") == pytest.approx(1, abs=0.01)
        assert model.error_growth(t, t, 64, "bfloat16") == pytest.approx(1, abs=0.01)
        # V, the weights and, where it goes through memory, M, which is float16 in either case.
        stored = pair != (2, 3)
        for dtype, roundings in (("float16", 2 + stored), ("bfloat16", 2 + stored / 64)):
            expected = (1 + roundings * t.amplification**2) ** 0.5
            rounded = model.error_growth(t, t, 64, dtype, half_domain=True)
            assert rounded == pytest.approx(expected, rel=0.01), (pair, dtype)
            one = model.error_growth(model.IDENTITY, t, 64, dtype, half_domain=True)
            assert one == pytest.approx((1 + 2 * t.amplification) ** 0.5, rel=0.01), (pair, dtype)


def test_half_precision_as_measured_on_the_kernels() -> None:
    """docs/GPU_STATUS.md: of the CUDA kernels, run on a CPU."""
    for tile, figures in ((2, (2.6, 2.6)), (4, (8.4, 7.0)), (6, (35, 29))):
        t = model.error_terms(kernel_transform(tile, 3))
        for dtype, measured in zip(("float16", "bfloat16"), figures, strict=True):
            growth = model.error_growth(t, t, 64, dtype, half_domain=True)
            assert growth == pytest.approx(measured, rel=0.05), (tile, dtype)


@pytest.mark.parametrize(
    ("x", "weight", "dtype", "tile"),
    [
        ((1, 64, 56, 56), (64, 64, 3, 3), "float32", 4),
        ((1, 512, 4, 4), (512, 512, 3, 3), "float32", 2),  # one tile of 36 positions, or four of 16
        ((8, 512, 4, 4), (512, 512, 3, 3), "float32", 4),
        ((1, 64, 56, 56), (64, 64, 3, 3), "float16", 6),  # computed in float32, and so exact enough
        ((1, 64, 1, 500), (64, 64, 1, 3), "float32", 6),  # errors grow less in one dimension
        ((1, 16, 56, 56), (64, 16, 5, 5), "float32", 4),
        ((1, 64, 56, 56), (64, 64, 5, 5), "float32", 2),
        ((1, 64, 56, 56), (64, 64, 7, 7), "float32", 2),
        ((0, 0, 5, 5), (0, 0, 3, 3), "float32", 2),
    ],
)
def test_choose_tile(x: tuple, weight: tuple, dtype: str, tile: int) -> None:
    padding = (weight[2] // 2, weight[3] // 2)
    assert co.ops.choose_tile(x, weight, padding, dtype=dtype) == tile


def test_no_tile_with_half_precision_inside_loses_more_than_allowed() -> None:
    for dtype, tiles in (("float16", [2]), ("bfloat16", [2, 4])):
        assert model.allowed_tiles(3, False, 64, dtype, half_domain=True) == tiles
        assert model.allowed_tiles(5, False, 64, dtype, half_domain=True) == [2]
        assert model.allowed_tiles(3, True, 64, dtype, half_domain=True) == [2, 4, 6]


def test_choose_tile_names_a_kernel_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'weight_shape' must be 3, 5 or 7 wide, got 4"):
        co.ops.choose_tile((1, 1, 9, 9), (1, 1, 4, 4))


def test_auto_is_the_chosen_tile() -> None:
    for shape in ((1, 8, 4, 4), (2, 8, 30, 30)):
        x, weight = torch.randn(shape), torch.randn(8, 8, 3, 3)
        tile = co.ops.choose_tile(shape, weight.shape, (1, 1))
        expected = co.ops.winograd_conv2d(x, weight, None, 1, tile=tile)
        assert torch.equal(co.ops.winograd_conv2d(x, weight, None, 1), expected)
