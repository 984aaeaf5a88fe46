"""Mistakes planted in the kernels of int4_linear and ternary_linear on mma.sync are found."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_on_cpu import harness
from cuda_on_cpu.harness import Plant
from test_cuda_on_cpu_checks import ALL_ORDERS, verdict

from compressops.ops.int8_linear import quantize_rows
from compressops.ops.packed_linear import Codes

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")

PACKED, OPERANDS = "packed_linear.cuh", "packed_linear_operands.cuh"
PLANTS = {
    "off by one": (
        Plant(PACKED, "i * kCopyRows < rows", "i * kCopyRows <= rows"),
        'global array "q".* out of bounds',
    ),
    "missing barrier": (
        Plant(PACKED, "sync_team();  // everyone's x", "// everyone's x"),
        'race on shared array "shared"|never written|before its cp.async',
    ),
    "missing barrier before the stages are used again": (
        Plant(PACKED, "sync_team();  // the stages are free", "// the stages are free"),
        'race on shared array "shared"',
    ),
    "wait that ends too early": (
        Plant(PACKED, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
        "before its cp.async is waited for",
    ),
    "a group's scale kept": (
        Plant(PACKED, "if (next != current.index)", "if (next < 0)"),
        "wrong result",
    ),
    "the last of a step's groups": (
        Plant(PACKED, "0.5f) * groups_a_unit)", "0.5f) * groups_a_unit / 2)"),
        'global array "scales".* out of bounds|wrong result',
    ),
    "a borrow between codes": (
        Plant(OPERANDS, "and_or<kMask, 0x80808080u>(shifted)", "and_or<kMask, 0u>(shifted)"),
        "wrong result",
    ),
    "a block that comes first adds": (
        Plant("split_sums.cuh", "1u) + 1 == splits", "1u) + 2 == splits"),
        "wrong result|a ticket is left",
    ),
    "a ticket that is not given back": (
        Plant("split_sums.cuh", "if (is_last[0]) tickets[tile] = 0;", ""),
        "a ticket is left",
    ),
    "zero points of other rows": (
        Plant(PACKED, "* x_sums[i][r];", "* x_sums[i][r ^ 1];"),
        "wrong result",
    ),
    "a step left out": (
        Plant(PACKED, "kRunSteps * (teams - 1) + 1", "kRunSteps * (teams - 1) + 2"),
        "wrong result",
    ),
    "a team left out": (
        Plant(PACKED, "other < teams; ++other", "other < teams / 2; ++other"),
        "wrong result",
    ),
}


@pytest.fixture(scope="module")
def planted():
    """All of them, built two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(harness.build, "packed_linear", plant, ("CUDA_ON_CPU_INT8_ONLY",))
            for name, (plant, _) in PLANTS.items()
        }
        return {name: future.result() for name, future in futures.items()}


@ALL_ORDERS
@pytest.mark.parametrize("name", PLANTS)
def test_mistakes_are_found(planted, name, order):
    x, kind = torch.randn(5, 1104), Codes("ternary_linear", 2, 1)
    codes = torch.randint(0, 3, (70, 1104), dtype=torch.uint8)
    scales = torch.rand(35, 70)  # groups of 32
    q, x_scales = quantize_rows(x)
    dense = (codes.double() - 1) * scales.double().t().repeat_interleave(32, 1)[:, :1104]
    expected = (q.double() @ dense.t()) * x_scales.double()

    def check() -> bool:
        for kernel in ("rows8", "wide"):
            y = harness.packed_linear(
                *(planted[name], kind, x, kind.pack_fragments(codes)),
                *(scales, None, 32),
                kernel=kernel,
                splits=3,
                order=order,
            )
            if not ((y.double() - expected).abs() < 1e-3).all():
                return False
        return True

    with pytest.raises(AssertionError, match=PLANTS[name][1]):
        raise AssertionError(verdict(check))
