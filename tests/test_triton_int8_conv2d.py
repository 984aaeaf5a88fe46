"""int8_conv2d in Triton's interpreter: bit for bit the results of the op's reference."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params
from test_cuda_on_cpu import assert_same
from test_int8_conv2d import HOW, Case
from test_int8_conv2d import make as arguments

from compressops import backend
from compressops.ops import int8_conv2d
from compressops.ops.int8_conv2d import block_of, pack_as

pytestmark = pytest.mark.skipif(
    "triton" not in [p.values[0][1] for p in kernel_params("int8_conv2d")],
    reason="needs triton, and TRITON_INTERPRET=1 or a GPU",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(args: tuple) -> torch.Tensor:
    args = tuple(v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in args)
    with backend("triton"):
        y = int8_conv2d(*args)
    with backend("eager"):
        expected = int8_conv2d(*args)
    assert y.stride() == expected.stride()
    assert_same(y, expected, args[9])
    return y


CASES = [
    Case(n=0),
    Case(n=1, c=1, h=1, w=1, k=1, kernel=(1, 1), padding=(0, 0)),
    Case(n=1, c=34, k=65, kernel=(1, 1), padding=(0, 0)),
    Case(n=1, c=3, h=11, w=9, k=20, kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    Case(n=1, c=150, h=3, w=4, kernel=(1, 2), stride=(3, 1), padding=(1, 0)),
    Case(n=1, stride=(2, 3), dilation=(2, 1), dtype=torch.float16, activation="gelu"),
    Case(n=1, h=2, w=3, padding=(9, 5), dilation=(3, 1), stride=(4, 3)),
    Case(n=1, c=34, k=36, groups=2, bias=False),
    Case(c=6, k=34, h=4, groups=2, activation="relu"),
    Case(n=1, c=5, k=15, groups=5),
    Case(c=21, k=21, h=4, groups=21, dtype=torch.bfloat16),
    Case(n=1, c=35, k=35, groups=35, stride=(2, 2), kernel=(5, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case):
    last = case.w % 2 == 0
    x, weight, *rest = arguments(case, DEVICE, channels_last=last)
    y = check((x, weight, *rest))
    # The form of GPUs, and where it is another that of CPUs, which is packed anew.
    packed = pack_as(weight, case.groups, *block_of(case.k, weight.shape[1], case.groups, cpu=last))
    assert torch.equal(check((x, packed, *rest)), y)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("how", HOW, ids=["asymmetric", "static", "zero"])
@pytest.mark.parametrize("groups", [1, 4])
def test_other_quantizations(how, groups):
    """Images that are shifted, large, tiny and zero, and one that holds NaN, in one call."""
    x, *rest = arguments(Case(n=6, c=4, h=4, w=3, k=4, groups=groups, padding=(2, 1)), DEVICE)
    x[0] += 3
    x[1] *= 1e30
    x[2] *= 1e-40
    x[3] = 0
    x[4, 3, 3, 2] = torch.nan
    y = check((x, *rest, *how))
    assert y[4].isnan().all()
    assert y[[0, 1, 2, 3, 5]].isfinite().all()


def test_ranges_of_many_parts():
    """Every part of a large image counts, wherever its largest value is."""
    case = Case(n=1, c=2, h=129, w=160, k=1, kernel=(1, 1), stride=(64, 64), padding=(0, 0))
    for at in ((0, 0, 0, 0), (0, 1, 128, 159), (0, 1, 3, 64)):
        x, *rest = arguments(case, DEVICE)
        x[at] = 100.0
        check((x, *rest, None, None, False))


def test_refuses_what_the_op_refuses():
    x, weight, *rest = arguments(Case(), DEVICE)
    with backend("triton"), pytest.raises(ValueError, match="int8_conv2d: argument 'weight'"):
        torch.ops.compressops.int8_conv2d(x, weight[:, :3], *rest)
