"""GPTQ alone: against a plain column by column sum, and on data that it did not see."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import correlated

from compressops.calibrate import Hessian, gptq
from compressops.formats import Int

INT4 = Int(bits=4, group_size=64)


def output_error(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    x, weight, other = x.double(), weight.double(), other.double()
    return float((x @ (weight - other).t()).norm() / (x @ weight.t()).norm())


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian()
    for piece in (x[:7], x[7:7], x[7:].view(1, -1, x.shape[1])):
        hessian.add(piece)
    torch.testing.assert_close(hessian.matrix, x.t() @ x / len(x), rtol=1e-4, atol=1e-3)
    return hessian.matrix


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [False, True])
def test_gptq_lowers_the_output_error_on_data_that_it_did_not_see(
    order: bool, symmetric: bool
) -> None:
    number = Int(bits=4, group_size=64, symmetric=symmetric)
    weight = torch.randn(96, 192) * torch.rand(96, 1)
    rounded, params = gptq(
        weight, hessian_of(correlated(2048, 192)), number, activation_order=order
    )
    nearest = number.fake_quantize(weight, number.fit(weight))
    other = correlated(512, 192, seed=1)
    before, after = (output_error(other, weight, w) for w in (nearest, rounded))
    assert after < 0.6 * before
    # Ordinary integers: rounding them again changes nothing.
    assert torch.equal(number.fake_quantize(rounded, params), rounded)
    number.check_params(params, (96, 192))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    ("shape", "number"),
    [
        ((5, 70), Int(4, 32)),
        ((5, 70), Int(3, None, False)),
        ((4, 33), Int(2, 7)),
        ((3, 1), Int(4)),
        ((2, 40), Int(8, 64)),
        ((0, 16), Int(4, 16)),
        ((4, 0), Int(4)),
    ],
    ids=str,
)
def test_gptq_is_a_plain_column_by_column_sum(
    shape: tuple[int, int], number: Int, order: bool
) -> None:
    """Against the definition in float64: each column's error goes to the columns after it by the
    inverse of what is left of the Hessian (eq. 2 and 3)."""
    rows, columns = shape
    weight, x = torch.randn(shape), correlated(200, max(4, columns))[:, :columns]
    hessian = x.t() @ x / 200
    results = [
        gptq(weight, hessian, number, activation_order=order, block_size=block)
        for block in (1, 16, 128)
    ]
    size = max(1, min(number.group_size or columns, columns))
    columns_order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    columns_order = columns_order if order else list(range(columns))
    h = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns).double()
    w = weight.double().clone()
    expected, params = torch.zeros_like(w), number.fit(weight)
    one = Int(number.bits, None, number.symmetric)
    for step, column in enumerate(columns_order):
        group = column // size
        if not order and column % size == 0:
            fitted = one.fit(w[:, column : column + size].float())
            for name, value in fitted.items():
                params[name][:, group] = value[:, 0]
        own = {name: value[:, group : group + 1] for name, value in params.items()}
        q = one.fake_quantize(w[:, column : column + 1].float(), own).double()[:, 0]
        expected[:, column] = q
        left = columns_order[step:]
        inverse = torch.linalg.inv(h[left][:, left])
        change = (w[:, column] - q)[:, None] * inverse[0] / inverse[0, 0]
        w[:, left] -= change
    for rounded, fitted in results:
        # Float rounding may take a value that lies between two integers either way.
        wrong = int((rounded.double() - expected).abs().gt(1e-4).sum())
        assert wrong <= 0.05 * rows * columns
        number.check_params(fitted, shape)


def test_gptq_keeps_pruned_entries_at_zero() -> None:
    weight = torch.randn(32, 64)
    mask = torch.rand(32, 64) < 0.4
    hessian = hessian_of(correlated(512, 64))
    for number in (Int(4, 16), Int(4, 16, False)):
        rounded, params = gptq(weight * mask, hessian, number, mask=mask)
        assert not rounded[~mask].any()
        assert torch.equal(number.fake_quantize(rounded, params), rounded)
        nearest = number.fake_quantize(weight * mask, number.fit(weight * mask))
        x = correlated(512, 64)
        assert output_error(x, weight * mask, rounded) < output_error(x, weight * mask, nearest)


def test_gptq_without_inputs_rounds_to_nearest() -> None:
    weight = torch.randn(8, 32)
    rounded, _ = gptq(weight, torch.zeros(32, 32), Int(4, 16))
    assert torch.equal(rounded, Int(4, 16).fake_quantize(weight, Int(4, 16).fit(weight)))
    # Inputs that are never other than 0, among others.
    hessian = hessian_of(correlated(64, 32))
    hessian[5], hessian[:, 5] = 0, 0
    assert gptq(weight, hessian, Int(4, 16))[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:5], r"hessian must be \[32, 32\] for a weight \[8, 32\], got \[5, 32\]"),
        (lambda h: h.fill_(float("nan")), "1024 NaN"),
        (lambda h: h - 2 * torch.diag(h.diagonal()) + 3 * torch.eye(32), "not positive definite"),
    ],
)
def test_gptq_names_a_bad_hessian(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq(torch.randn(8, 32), change(hessian_of(correlated(64, 32))), Int(4))
