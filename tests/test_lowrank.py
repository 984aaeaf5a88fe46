"""Low-rank weights: decompositions against exact optima."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressops.formats import LowRank, PackedTensor, Sparse
from compressops.formats.decompose import Spectrum, decompose, unfolded
from compressops.nn import LowRankConv2d, LowRankLinear

FORMS = ("matrix", "spatial", "tucker", "cp")
RANKS = {"matrix": 5, "spatial": 7, "tucker": (5, 4), "cp": 9}
every_form = pytest.mark.parametrize("form", FORMS)


def packed(layout: LowRank, shape: tuple[int, ...], seed: int = 0) -> PackedTensor:
    """Random factors, for which nothing has to be decomposed."""
    generator = torch.Generator().manual_seed(seed)
    factors = [
        torch.randn(size, generator=generator) / torch.Size(size[1:]).numel() ** 0.5
        for size in layout.factor_shapes(shape).values()
    ]
    return PackedTensor.from_factors(
        [PackedTensor.pack(factor) for factor in factors], shape, torch.float32, layout
    )


def dense(layout: LowRank, factors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The weight of each form in float64, as the papers write it."""
    factors = [factor.double() for factor in factors]
    if layout.form == "matrix":
        return torch.einsum("ok,kc->oc", *factors).reshape(shape)
    if layout.form == "spatial":
        return torch.einsum("okax,kiyb->oiyx", *factors)
    if layout.form == "tucker":
        return torch.einsum("op,pqyx,qi->oiyx", *factors)
    u, core, v = factors
    return torch.einsum("or,rayx,ri->oiyx", u, core, v)


@every_form
@pytest.mark.parametrize("shape", [(12, 10, 3, 3), (9, 11, 3, 5), (10, 9, 1, 4), (16, 12, 1, 1)])
def test_factors_multiply_out_to_the_weight_of_the_papers(form: str, shape) -> None:
    layout = LowRank(RANKS[form], form)
    weight = packed(layout, shape)
    factors = [factor.unpack() for factor in weight.factors()]
    exact = dense(layout, factors, shape)
    torch.testing.assert_close(weight.unpack().double(), exact, rtol=2e-6, atol=2e-6)
    composed = layout.compose([factor.double() for factor in factors], shape)
    torch.testing.assert_close(composed, exact)


@pytest.mark.parametrize("form", ["matrix", "spatial"])
@pytest.mark.parametrize("shape", [(12, 10, 3, 3), (40, 2, 1, 3), (5, 9, 5, 1), (7, 7, 1, 1)])
def test_two_factors_are_the_optimum_of_eckart_and_young(form: str, shape) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(unfolded(form, weight))
    for rank in {1, len(values) // 2, len(values)} - {0}:
        layout = LowRank(rank, form)
        factors = decompose(layout, weight)
        assert [tuple(f.shape) for f in factors] == list(layout.factor_shapes(shape).values())
        error = (layout.compose(factors, shape) - weight).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-9, atol=1e-20)
        errors = Spectrum.of(unfolded(form, weight)).errors()
        torch.testing.assert_close(error / weight.square().sum(), errors[rank], atol=1e-12, rtol=0)


def test_factors_have_one_scale() -> None:
    weight = torch.randn(20, 30) * torch.rand(20, 1).mul(8).exp()
    u, v = decompose(LowRank(6), weight)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))


def whitened(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """SVD-LLM's: W S = U Σ Vᵀ with the Cholesky factor S of X Xᵀ, cut, and S taken back."""
    s = torch.linalg.cholesky(inputs @ inputs.mT)
    u, sigma, vt = torch.linalg.svd(weight @ s, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank] @ torch.linalg.inv(s)


@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (14, 9)])
def test_calibrated_factors_are_the_whitened_optimum(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    inputs = torch.randn(columns, columns, dtype=torch.float64) @ torch.randn(
        columns, 60, dtype=torch.float64
    )
    outputs = weight @ inputs
    spectrum = Spectrum.of_outputs(outputs @ outputs.mT)
    for rank in (1, 4, 8):
        u, v = decompose(LowRank(rank), weight, spectrum)
        ours = ((weight - u @ v) @ inputs).norm()
        theirs = ((weight - whitened(weight, inputs, rank)) @ inputs).norm()
        torch.testing.assert_close(ours, theirs)
        # By brute force: alternating least squares from elsewhere finds nothing better.
        a = torch.randn(rows, rank, dtype=torch.float64)
        for _ in range(100):
            b = torch.linalg.lstsq(a, outputs).solution
            a = torch.linalg.lstsq(b.mT, outputs.mT).solution.mT
        assert ours <= (outputs - a @ b).norm() * (1 + 1e-9)
        torch.testing.assert_close(ours, (outputs - a @ b).norm(), rtol=1e-3, atol=1e-9)
        plain = weight - torch.mm(*decompose(LowRank(rank), weight))
        assert ours < (plain @ inputs).norm()


def root(matrix: Tensor) -> Tensor:
    squares, vectors = torch.linalg.eigh(matrix)
    return vectors * squares.sqrt() @ vectors.mT


@pytest.mark.parametrize(("out", "inputs", "h", "w"), [(5, 3, 3, 3), (2, 7, 3, 2), (4, 4, 1, 5)])
def test_calibrated_spatial_factors(out: int, inputs: int, h: int, w: int) -> None:
    """The error of outputs whose columns see K ⊗ C: their formula, and the least of a rank."""
    torch.manual_seed(0)
    weight = torch.randn(out, inputs, h, w, dtype=torch.float64)
    c, k = (torch.randn(n, n, dtype=torch.float64) for n in (inputs * h, w))
    c, k = c @ c.mT, k @ k.mT
    spectrum = Spectrum.of_columns(weight, c, k)

    def error(found: Tensor) -> float:
        columns = [unfolded("spatial", weight - found).view(out, w, -1)[:, a] for a in range(w)]
        return sum(
            (k[a, b] * (columns[a] @ c @ columns[b].mT).trace()).item()
            for a in range(w)
            for b in range(w)
        )

    whole = error(torch.zeros_like(weight))
    sides = torch.kron(torch.eye(out, dtype=torch.float64), root(k)), root(c)
    for rank in range(1, LowRank.largest("spatial", tuple(weight.shape))):
        layout = LowRank(rank, "spatial")
        found = layout.compose(decompose(layout, weight, spectrum), tuple(weight.shape))
        best = torch.linalg.svdvals(sides[0] @ unfolded("spatial", weight) @ sides[1])[rank:]
        assert error(found) == pytest.approx(best.square().sum().item(), rel=1e-6, abs=1e-9 * whole)
        assert spectrum.errors()[rank].item() == pytest.approx(error(found) / whole, abs=1e-9)
        plain = layout.compose(decompose(layout, weight), tuple(weight.shape))
        assert error(found) <= error(plain) * (1 + 1e-9)


def test_columns_that_see_the_same_are_no_obstacle() -> None:
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    ones = torch.ones(3, 3, dtype=torch.float64)
    spectrum = Spectrum.of_columns(weight, torch.eye(12, dtype=torch.float64), ones)
    layout = LowRank(3, "spatial")
    found = layout.compose(decompose(layout, weight, spectrum), tuple(weight.shape))
    # Only the sum over the columns counts, which three directions give.
    torch.testing.assert_close(found.sum(3), weight.sum(3), rtol=1e-4, atol=1e-4)


def test_a_singular_moment_is_no_obstacle() -> None:
    weight, inputs = torch.randn(8, 20).double(), torch.randn(20, 3).double()
    outputs = weight @ inputs
    u, v = decompose(LowRank(3), weight, Spectrum.of_outputs(outputs @ outputs.mT))
    torch.testing.assert_close(u @ v @ inputs, outputs)


@pytest.mark.parametrize("form", ["tucker", "cp"])
def test_tensor_decompositions(form: str) -> None:
    pytest.importorskip("tensorly")
    exact = LowRank((3, 2) if form == "tucker" else 3, form)
    weight = packed(exact, (10, 8, 3, 3)).unpack()
    found = exact.compose(decompose(exact, weight), tuple(weight.shape))
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3 * weight.abs().max().item())
    errors = []
    weight = torch.randn(10, 8, 3, 3)
    for rank in ((2, 2), (5, 4), (10, 8)) if form == "tucker" else (2, 8, 30):
        layout = LowRank(rank, form)
        factors = decompose(layout, weight)
        assert all(factor.dtype == weight.dtype for factor in factors)
        product = layout.compose(factors, tuple(weight.shape))
        errors.append(((product - weight).norm() / weight.norm()).item())
    assert sorted(errors, reverse=True) == errors
    if form == "tucker":
        assert errors[-1] < 1e-5
        # At least as good as its start, the higher-order SVD.
        u, v = (Spectrum.of(weight.transpose(0, m).flatten(1)).basis for m in (0, 1))
        p, q = u[:, :5] @ u[:, :5].mT, v[:, :4] @ v[:, :4].mT
        start = torch.einsum("ab,bcyx,cd->adyx", p, weight.double(), q)
        assert errors[1] <= (start - weight).norm() / weight.norm() + 1e-6


def test_tensorly_is_asked_for_by_name(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(ImportError, match=r"need tensorly: pip install compressops\[lowrank\]"):
        decompose(LowRank(2, "cp"), torch.randn(4, 4, 3, 3))


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 9),
    i=st.integers(1, 9),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    share=st.floats(0, 1),
    form=st.sampled_from(FORMS),
)
def test_any_shape(o: int, i: int, h: int, w: int, share: float, form: str) -> None:
    shape = (o, i, h, w)
    largest = LowRank.largest(form, shape)
    if form == "tucker":
        rank = tuple(max(1, round(share * most)) for most in largest)
    else:
        rank = max(1, round(share * largest))
    layout = LowRank(rank, form)
    weight = packed(layout, shape)
    again = PackedTensor.from_blob(weight.to_spec(), weight.to_blob())
    assert torch.equal(again.unpack(), weight.unpack())
    assert weight.layout.entries(shape) == sum(f.nbytes // 4 for f in weight.factors())
    conv = nn.Conv2d(i, o, (h, w), padding=(h // 2, w // 2))
    layer = LowRankConv2d.from_module(conv, weight)
    x = torch.randn(2, i, 6, 5)
    expected = F.conv2d(
        x.double(), weight.unpack().double(), conv.bias.double(), 1, (h // 2, w // 2)
    )
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    if form in ("matrix", "spatial"):
        factors = decompose(layout, conv.weight)
        best = torch.linalg.svdvals(unfolded(form, conv.weight.double()))[rank:].norm()
        error = (layout.compose(factors, shape) - conv.weight).norm()
        assert error <= best + 1e-5 * conv.weight.norm()


ERRORS = [
    (lambda: LowRank(0), "rank must be an integer from 1"),
    (lambda: LowRank(2, "svd"), "form must be one of matrix, spatial, tucker, cp, got 'svd'"),
    (lambda: LowRank(2, "tucker"), r"rank of 'tucker' must be \(outputs, inputs\), got 2"),
    (lambda: LowRank((2, 0), "tucker"), "rank must be an integer from 1 to .* got 0"),
    (lambda: LowRank((2, 2)), r"rank must be an integer .* got \(2, 2\)"),
    (lambda: decompose(LowRank(2, "spatial"), torch.ones(4, 4)), r"needs a weight \[O, I, h, w\]"),
    (lambda: decompose(LowRank(9), torch.ones(4, 4)), "rank 9 of a 4 × 4 matrix"),
    (lambda: decompose(LowRank((9, 1), "tucker"), torch.ones(4, 4, 3, 3)), r"rank \(9, 1\)"),
    (lambda: decompose(LowRank(2), torch.full((4, 4), torch.nan)), "NaN or infinite"),
    (lambda: LowRank(1).factor_shapes((0, 4)), "rank 1 of a 0 × 4 matrix"),
    (
        lambda: LowRankConv2d.from_float(nn.Conv2d(4, 4, 3, groups=2), LowRank(1)),
        "groups: LowRankConv2d needs 1, got 2",
    ),
    (
        lambda: LowRankLinear.from_float(nn.Linear(4, 4), Sparse()),
        "low-rank layers need the layout LowRank, got",
    ),
    (
        lambda: PackedTensor.from_factors(
            [PackedTensor.pack(torch.ones(2, 2))], (2, 2), torch.float32, LowRank(2)
        ),
        "don't make a weight",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("form", ["spatial", "tucker", "cp"])
def test_corrupt_specs_are_refused(form: str) -> None:
    weight = packed(LowRank((2, 2) if form == "tucker" else 2, form), (4, 3, 3, 2))
    spec, blob = weight.to_spec(), weight.to_blob()
    shapes = itertools.chain.from_iterable(
        ({"shape": shape}, {"layout": layout})
        for shape, layout in (
            ([4, 3, 2, 3], {**spec["layout"], "rank": 1 if form != "tucker" else [1, 2]}),
            ([3, 4, 3, 2], {**spec["layout"], "rank": 10**6 if form != "tucker" else [2, 10**6]}),
            ([4, 3, 6], {**spec["layout"], "form": "matrix"}),
        )
    )
    for change in shapes:
        with pytest.raises(ValueError, match=r".+"):
            PackedTensor.from_blob({**spec, **change}, blob)
    meta = {name: value for name, value in spec["meta"].items() if name != "v"}
    with pytest.raises(ValueError, match="LowRank has meta"):
        PackedTensor.from_blob({**spec, "meta": meta}, blob)


def test_memory_of_cp_is_bounded() -> None:
    """Its intermediate can be larger than the weight, and so counts."""
    layout = LowRank(2048, "cp")
    assert layout.buffer_size((1, 2048, 64, 64)) == 2048 * 2048 * 64 * 64
    assert layout.buffer_size((4096, 8, 3, 3)) == 4096 * 8 * 9


def test_multiply_accumulates_are_counted_by_position() -> None:
    """At stride s the layers before the kernel see s² positions for one of the output's."""
    shape, stride = (8, 6, 3, 5), (2, 3)
    for rank, form, expected in (
        (4, "matrix", 4 * 6 * 15 + 8 * 4),
        (4, "spatial", 3 * 4 * 6 * 3 + 8 * 4 * 5),
        ((3, 2), "tucker", 6 * 2 * 6 + 3 * 2 * 15 + 8 * 3),
        (4, "cp", 6 * 4 * 6 + 4 * 15 + 8 * 4),
    ):
        assert LowRank(rank, form).macs(shape, stride) == expected
