"""winograd_conv2d: every backend against direct convolution in float64."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from winograd_cases import (
    ALL_KERNELS,
    ALL_TILES,
    FLOATS,
    OP,
    PARAMS,
    Case,
    assert_matches,
    call,
    direct,
    interpreted,
    make,
    measured_growth,
)

import compressops as co
from compressops import backends
from compressops.ops.winograd_transform import SUPPORTED

CASES = [
    *(Case(2, 6, 10, 11, 13, r, flat, tile) for tile, r in SUPPORTED for flat in (False, True)),
    *(Case(2, 6, 9, 9, 7, r, tile=tile, groups=3, padding=(0, 2)) for tile, r in SUPPORTED),
    *(Case(c=c, k=k) for c, k in ((1, 1), (15, 17), (16, 16), (17, 31), (33, 65), (130, 40))),
    *(Case(c=4, k=12, groups=groups) for groups in (2, 4)),
    Case(c=24, k=24, groups=24, tile=2),
    Case(c=34, k=66, groups=2, tile=6),
    *(Case(padding=p) for p in ((0, 0), (0, 1), (2, 0), (2, 2), (3, 5), (9, 8))),
    *(Case(flat=True, h=1, padding=(0, p)) for p in (0, 2, 7)),
    Case(flat=True, h=5, padding=(2, 1)),
    *(Case(c=40, k=20, tile=tile, dtype=dtype) for tile in (2, 4, 6) for dtype in FLOATS[1:]),
    *(Case(activation=name, dtype=dtype) for name in ("relu", "gelu") for dtype in FLOATS),
    *(Case(2, 20, 20, channels_last=True, dtype=dtype, activation="relu") for dtype in FLOATS),
    Case(c=5, k=3, channels_last=True, activation="gelu"),
    Case(bias=False),
    Case(3, 4, 4, 50, 37),
]
# Few and small, one of each kind.
INTERPRETED = [
    *(Case(1, 3, 5, 7, 6, r, flat, tile) for tile, r in SUPPORTED for flat in (False, True)),
    Case(2, 4, 6, 5, 5, padding=(0, 3), groups=2, dtype=torch.bfloat16, activation="relu"),
    Case(1, 17, 3, 4, 6, channels_last=True, dtype=torch.float16, activation="gelu", bias=False),
]


def check(case: Case, device: torch.device) -> None:
    args = make(case, device)
    y = call(*args, case)
    assert_matches(y, *args, case)
    format = torch.channels_last if case.channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=format)


@ALL_KERNELS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(kernel: torch.device, case: Case) -> None:
    if not interpreted() or case == CASES[0]:
        check(case, kernel)


@pytest.mark.parametrize("kernel", [p for p in PARAMS if p.values[0][1] == "triton"], indirect=True)
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_matches_float64_few(kernel: torch.device, case: Case) -> None:
    check(case, kernel)


@pytest.fixture
def one_thread():
    """For thousands of tiny calls: beside other work, each would wait for its second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@ALL_KERNELS
@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.usefixtures("one_thread")
def test_every_height_and_width(kernel: torch.device, tile: int) -> None:
    """What may go wrong here is an edge, and then by far: the bound is none of the rounding's."""
    few, many = interpreted(), range(1, 20)
    sizes = [(h, w, 1, 1) for h in many for w in many]
    sizes += [(3, w, padding, 2) for w in many for padding in range(4)]
    weight, bias = torch.randn(3, 2, 3, 3, device=kernel), torch.randn(3, device=kernel)
    for h, w, *padding in [(1, 1, 1, 1), (2, 7, 1, 1), (13, 3, 2, 0)] if few else sizes:
        x = torch.randn(1, 2, h, w, device=kernel)
        y = co.ops.winograd_conv2d(x, weight, bias, padding, tile=tile)
        expected = direct(x, weight, bias, padding, 1)
        assert y.shape == expected.shape
        assert (y.cpu().double() - expected).abs().max() < 1e-3, (h, w, padding)
    for h, w in [] if few else [(h, w) for h in (1, 2, 5) for w in many]:
        x = torch.randn(1, 2, h, w, device=kernel)
        y = co.ops.winograd_conv2d(x, weight[:, :, :1], bias, (0, 1), tile=tile)
        expected = direct(x, weight[:, :, :1], bias, (0, 1), 1)
        assert y.shape == expected.shape
        assert (y.cpu().double() - expected).abs().max() < 1e-3, (h, w)


@given(st.data())
@pytest.mark.usefixtures("one_thread")
def test_random_cases(data) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    tile, r = data.draw(st.sampled_from(SUPPORTED))
    flat, groups, padding = data.draw(st.booleans()), draw(1, 3), (draw(0, 8), draw(0, 8))
    rh = 1 if flat else r
    case = Case(
        *(draw(0, 3), groups * draw(0, 20), groups * draw(0, 40)),
        *(draw(max(1, rh - 2 * padding[0]), 24), draw(max(1, r - 2 * padding[1]), 24)),
        *(
            r,
            flat,
            tile,
            padding,
            groups,
            data.draw(st.sampled_from(FLOATS)),
            data.draw(st.booleans()),
        ),
        data.draw(st.sampled_from(("none", "relu", "gelu"))),
    )
    torch.manual_seed(draw(0, 2**32))
    args = make(case)
    assert_matches(call(*args, case), *args, case)


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of ``x`` under other strides."""
    n, c, h, w = x.shape
    wide = x.new_zeros(n + 1, c + 2, 2 * h, w + 3)
    wide[1:, 1:-1, ::2, 2:-1] = x
    return {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "slice": wide[1:, 1:-1, ::2, 2:-1],
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "every second channel": torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
        "slice of channels last": F.pad(x, (0, 0, 0, 0, 3, 2)).contiguous(
            memory_format=torch.channels_last
        )[:, 3:-2],
    }


@ALL_KERNELS
def test_any_strides(kernel: torch.device) -> None:
    case = Case(2, 18, 20, 9, 11)
    if interpreted():
        case = Case(2, 3, 4, 5, 6)
    x, weight, bias = make(case, kernel)
    expected = call(x, weight, bias, case)
    views = strided(x)
    if interpreted():
        views = {name: views[name] for name in ("channels last", "slice")}
    for name, view in views.items():
        assert torch.equal(view, x)
        y = call(view, weight, bias, case)
        assert torch.equal(y, expected), name
        last = view.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last) == last, name
        assert y.is_contiguous() != last, name
    for view in [] if interpreted() else strided(weight).values():
        assert torch.equal(call(x, view, bias, case), expected)
    assert torch.equal(call(x, weight, torch.stack([bias, bias], 1)[:, 0], case), expected)


@ALL_KERNELS
def test_expanded_inputs(kernel: torch.device) -> None:
    case = Case(3, 4, 6, 7, 8)
    weight, bias = make(case, kernel)[1:]
    shapes = ((1, 4, 7, 8), (3, 1, 7, 8), (3, 4, 1, 8), (1, 1, 1, 1))
    for shape in shapes[3:] if interpreted() else shapes:
        x = torch.randn(shape, device=kernel).expand(3, 4, 7, 8)
        assert torch.equal(call(x, weight, bias, case), call(x.contiguous(), weight, bias, case))


@ALL_KERNELS
def test_what_is_contiguous_both_ways_gives_a_contiguous_result(kernel: torch.device) -> None:
    for shape in ((2, 1, 5, 6), (2, 5, 1, 1), (1, 1, 1, 1), (0, 5, 4, 6)):
        x = torch.randn(shape, device=kernel).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(4, shape[1], 3, 3, device=kernel)
        y = co.ops.winograd_conv2d(x, weight, padding=1, tile=2)
        assert y.is_contiguous()
        with torch._subclasses.FakeTensorMode() as mode:
            x, weight = mode.from_tensor(x), mode.from_tensor(weight)
            assert co.ops.winograd_conv2d(x, weight, padding=1, tile=2).stride() == y.stride()


@ALL_KERNELS
def test_empty(kernel: torch.device) -> None:
    for case in (
        Case(n=0),
        Case(c=0),
        Case(c=0, bias=False),
        Case(k=0),
        Case(n=0, c=0, k=0, bias=False),
        Case(c=0, k=4, groups=2, activation="gelu"),
    ):
        args = make(case, kernel)
        y = call(*args, case)
        assert y.shape == (case.n, case.k, 8, 9)
        expected = 0.0 if args[2] is None else args[2][:, None, None]
        if case.activation == "gelu":
            expected = F.gelu(expected)
        allowed = 1e-6 if case.activation == "gelu" else 0.0  # the CPU's own gelu rounds otherwise
        torch.testing.assert_close(y, torch.zeros_like(y) + expected, rtol=0, atol=allowed)


@ALL_KERNELS
def test_one_dimension(kernel: torch.device) -> None:
    for tile, r in SUPPORTED:
        x, weight = torch.randn(2, 4, 23, device=kernel), torch.randn(6, 2, r, device=kernel)
        bias = torch.randn(6, device=kernel)
        y = co.ops.winograd_conv1d(x, weight, bias, 2, 2, "relu", tile)
        case = Case(padding=(0, 2), groups=2, activation="relu", tile=tile)
        assert_matches(y.unsqueeze(2), x.unsqueeze(2), weight.unsqueeze(2), bias, case)
        packed = co.ops.winograd_conv2d_pack(weight.unsqueeze(2), 2, tile)
        assert torch.equal(y, co.ops.winograd_conv1d(x, weight, bias, 2, 2, "relu", tile, packed))
        if interpreted():
            return
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(y, co.ops.winograd_conv1d(turned, weight, bias, 2, 2, "relu", tile))


# Error: as many times that of torch's direct convolution, in the same dtype.
BOUNDS = {(2, 3): 2.0, (4, 3): 8.0}


@ALL_KERNELS
@ALL_TILES
def test_error_is_a_bounded_multiple_of_direct_convolutions(
    kernel: torch.device, tile: int, r: int
) -> None:
    if interpreted():
        pytest.skip("a case large enough takes the interpreter minutes")
    # How eager sums many channels is the affair of torch's matrix product.
    several = (64, 256) if backends.name(OP, kernel.type) != "eager" else (64,)
    for dtype in FLOATS if r == 3 else FLOATS[:1]:
        for channels in several if dtype == torch.float32 else (64,):
            growth = measured_growth(tile, r, dtype, channels, kernel)
            print(
                f"\nF({tile}, {r}) {str(dtype)[6:]} {channels} channels, × torch's direct error: "
                f"{growth.max:.2f} max, {growth.rms:.2f} RMS",
                end="",
            )
            if dtype == torch.float32 and (tile, r) in BOUNDS:
                assert growth.max <= BOUNDS[tile, r]
                assert growth.rms <= BOUNDS[tile, r]
            if dtype != torch.float32 and kernel.type == "cpu":
                assert growth.max <= 1.05  # float32 inside: the last rounding is all the error


@ALL_KERNELS
@ALL_TILES
def test_no_overflow_in_float16(kernel: torch.device, tile: int, r: int) -> None:
    if interpreted() and (tile, r) != (6, 3):
        return
    alpha = tile + r - 1
    # Signs that make rows of Bᵀ d B as large as they get, for one tile and for its neighbours.
    signs = co.ops.winograd_transform.kernel_transform(tile, r).bt
    patterns = [
        64.0 * torch.tensor([[1.0 if a * b >= 0 else -1.0 for b in row] for a in row])
        for row in signs
    ]
    x = torch.stack(patterns).half()[None].to(kernel)  # [1, alpha, alpha, alpha]
    x = torch.cat([x, torch.full_like(x, 64.0), torch.full_like(x, -64.0)])
    weight = torch.randn(4, alpha, r, r, device=kernel).sign().half()
    weight = weight / (2 * alpha)
    for padding in (0, 1, r - 1):
        case = Case(tile=tile, padding=(padding, padding), dtype=torch.float16)
        y = call(x, weight, None, case)
        assert y.isfinite().all()
        assert_matches(y, x, weight, None, case)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@ALL_KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_tiles_and_gets_lost_nowhere(
    kernel: torch.device, value: float
) -> None:
    case = Case(2, 3, 4, 14, 13, tile=4)
    if interpreted():
        case = Case(1, 2, 2, 9, 7, tile=4)
    x, weight, bias = make(case, kernel)
    sound = call(x, weight, bias, case)
    h, w = 6, 5
    x[0, 1, h, w] = value
    y = call(x, weight, bias, case)
    touched = torch.zeros(sound.shape[2:], dtype=torch.bool)
    touched[h - 1 : h + 2, w - 1 : w + 2] = True  # what reads the pixel in direct convolution
    assert not y[0, :, touched].isfinite().any()
    first, end = (h - 5 + 1 + 3) // 4 * 4, (h + 1) // 4 * 4 + 4  # rows of the tiles that read it
    left, right = (w - 5 + 1 + 3) // 4 * 4, (w + 1) // 4 * 4 + 4
    touched[first:end, left:right] = True
    assert torch.equal(y[0, :, ~touched], sound[0, :, ~touched])
    assert torch.equal(y[1:], sound[1:])


@ALL_KERNELS
def test_relu_keeps_nan(kernel: torch.device) -> None:
    case = Case(h=4, w=4, activation="relu")
    x, weight, bias = make(case, kernel)
    assert call(x.fill_(float("nan")), weight, bias, case).isnan().all()


@ALL_KERNELS
def test_offsets_past_2_to_the_31(kernel: torch.device) -> None:
    if kernel.type != "cpu" or interpreted():
        pytest.skip("memory that is never touched costs nothing on a CPU alone")
    stride = 2**31 + 8
    memory = torch.empty(stride + 64, dtype=torch.bfloat16)  # 4 GB of addresses
    x = memory.as_strided((1, 2, 6, 7), (1, stride, 7, 1))
    x.copy_(torch.randn(x.shape))
    case = Case(c=2, dtype=torch.bfloat16)
    weight = make(Case(c=2, dtype=torch.bfloat16))[1]
    expected = call(x.contiguous(), weight, None, case)
    assert torch.equal(call(x, weight, None, case), expected)


@ALL_KERNELS
def test_packed_weights_give_the_same(kernel: torch.device) -> None:
    case = Case(c=6, k=50, h=4, w=5, groups=2)
    x, weight, bias = make(case, kernel)
    expected = call(x, weight, bias, case)
    packed = co.ops.winograd_conv2d_pack(weight, 2, 4)
    y = co.ops.winograd_conv2d(x, weight, bias, (1, 1), 2, tile=4, transformed=packed)
    assert torch.equal(y, expected)
    assert torch.equal(y, co.ops.winograd_conv2d(x, weight, bias, 1, 2, "none", 4))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_packing(dtype: torch.dtype) -> None:
    for k, c, groups in ((1, 1, 1), (16, 3, 3), (17, 3, 1), (32, 2, 1), (40, 5, 2), (64, 4, 1)):
        for tile, r in SUPPORTED[:: 3 if k > 17 else 1]:
            for rh in (1, r):
                weight = torch.randn(k * groups, c, rh, r).to(dtype)
                packed = co.ops.winograd_conv2d_pack(weight, groups, tile)
                P = (tile + r - 1) ** (2 if rh > 1 else 1)
                exact = co.ops.winograd_conv2d_pack(weight.double(), groups, tile)
                assert exact.shape == (P, k * groups, c)
                if dtype == torch.float64:
                    assert torch.equal(packed, exact)
                    continue
                assert packed.dtype == torch.float32
                assert packed.shape == (groups, -(-k // 16) * 16, P, c)
                # Rounded once; sums in float64 may end a last bit apart.
                rounded = co.ops.winograd_conv2d_unpack(packed, k * groups)
                error = (rounded.double() - exact).abs()
                assert (error <= 2.0**-24 * (1 + 1e-6) * exact.abs() + 1e-15).all()
    weight = torch.randn(40, 5, 3, 3)
    packed = co.ops.winograd_conv2d_pack(weight, 1, 2).flatten()
    u = co.ops.winograd_conv2d_pack(weight.double(), 1, 2).float()
    for p, k, c in ((0, 0, 0), (3, 31, 4), (7, 32, 2), (15, 39, 0), (15, 40, 4), (2, 47, 1)):
        at = (p * 5 + c) * 32 + k if k < 32 else 32 * 16 * 5 + (p * 5 + c) * 16 + k - 32
        assert packed[at] == pytest.approx(u[p, k, c].item() if k < 40 else 0.0, rel=1e-6)
