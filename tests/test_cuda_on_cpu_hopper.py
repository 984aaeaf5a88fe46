"""Mistakes planted in the kernels for Hopper are found by the model of its instructions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_on_cpu import harness
from cuda_on_cpu.harness import Plant
from test_cuda_on_cpu import reference
from test_cuda_on_cpu_checks import verdict
from test_cuda_on_cpu_packed_linear import Case, Layer

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")

WGMMA, STAGES = "int8_linear_wgmma.cuh", "stages.cuh"
WGMMA_PLANTS = {
    "a stage released too early": (
        Plant(WGMMA, "        wgmma_wait<1>();\n", ""),
        "TMA over what a wgmma",
    ),
    "sums stored before they are there": (
        Plant(WGMMA, "      wgmma_wait<0>();\n", ""),
        "wrong result|TMA over what a wgmma",
    ),
    "a stage read before it is filled": (
        Plant(WGMMA, "        ring.wait();\n", ""),
        "before the TMA copy is waited for|never written|TMA over what a wgmma",
    ),
    "a stage that is never released": (
        Plant(WGMMA, "if (step > 0 && lane == 0)", "if (step > 1 && lane == 0)"),
        "deadlock",
    ),
    "a release too many": (
        Plant(WGMMA, "if (step > 0 && lane == 0)", "if (lane == 0)"),
        "TMA over what a wgmma|gets one more|wrong result|two copies",
    ),
    "the phase before": (
        Plant(
            STAGES, "mbarrier_wait(full + stage, phase);", "mbarrier_wait(full + stage, phase ^ 1);"
        ),
        "before the TMA copy is waited for|never written|TMA over what a wgmma",
    ),
    "bytes that never come": (
        Plant(WGMMA, "ring.acquire(Tile::kStageBytes)", "ring.acquire(Tile::kStageBytes + 16)"),
        "deadlock",
    ),
    "missing __syncthreads": (
        Plant(WGMMA, "    __syncthreads();\n", ""),
        "with no __syncthreads between|that nobody made",
    ),
    "the other warpgroup's rows": (
        Plant(WGMMA, "first_m + group_row + warp % 4", "first_m + 64 - group_row + warp % 4"),
        "wrong result",
    ),
    "the neighbour's columns": (
        Plant(WGMMA, "odd ? words[0] : words[1], 1)", "odd ? words[1] : words[0], 1)"),
        "wrong result",
    ),
}


PACKED = "packed_linear_wgmma.cuh"
PACKED_PLANTS = {
    "unpacked over what is being multiplied": (
        Plant(PACKED, "          wgmma_wait<1>();\n", ""),
        "registers of a wgmma are written|TMA over what a wgmma",
    ),
    "a group that is scaled too early": (
        Plant(PACKED, "            wgmma_wait<0>();\n            fold();", "            fold();"),
        "wrong result",
    ),
    "the next group's scale": (
        Plant(
            PACKED,
            "            fold();\n            current = ahead;",
            "            current = ahead;\n            fold();",
        ),
        "wrong result",
    ),
    "the zero points of the group before": (
        Plant(PACKED, "ahead.zeros[half]", "current.zeros[half]"),
        "wrong result",
    ),
    "another lane's codes": (
        Plant(PACKED, "low_lane + 2);", "low_lane + 1);"),
        "wrong result",
    ),
    "a stage that is never released": (
        Plant(PACKED, "      if (steps > 1) release(2);\n", ""),
        "deadlock",
    ),
}


@pytest.fixture(scope="module")
def planted():
    """All of them, built two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {
            (op, name): pool.submit(harness.build, op, plant, ("CUDA_ON_CPU_WGMMA_ONLY",))
            for op, plants in (("int8_linear", WGMMA_PLANTS), ("packed_linear", PACKED_PLANTS))
            for name, (plant, _) in plants.items()
        }
        return {key: future.result() for key, future in futures.items()}


@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("name", WGMMA_PLANTS)
def test_mistakes_planted_in_int8_linear_are_found(planted, name, order):
    """More steps than stages, and more tiles than blocks."""
    x, weight = torch.randn(258, 1168).half(), torch.randint(-128, 128, (136, 1168)).to(torch.int8)
    scales = torch.rand(136) / 1000
    expected = reference(x, weight, scales, None, "none")

    def check() -> bool:
        library = planted["int8_linear", name]
        y = harness.int8_linear(library, x, weight, scales, kernel="wgmma128", order=order)
        return torch.equal(y, expected)

    with pytest.raises(AssertionError, match=WGMMA_PLANTS[name][1]):
        raise AssertionError(verdict(check))


@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("name", PACKED_PLANTS)
def test_mistakes_planted_in_int4_linear_are_found(planted, name, order):
    """Groups of two steps, and more tiles than blocks."""
    case = Case(130, 136, 64 * 11, 128, zeros=True, bias=False, kernel="wgmma")
    layer = Layer.make(case)
    layer.scales.copy_(2.0 ** torch.randint(-3, 4, layer.scales.shape))  # exact sums
    x = torch.randint(-8, 9, (case.M, case.K)).half()
    expected = (x.double() @ layer.dense().t()).half()

    def check() -> bool:
        return torch.equal(layer.run(planted["packed_linear", name], x, order), expected)

    with pytest.raises(AssertionError, match=PACKED_PLANTS[name][1]):
        raise AssertionError(verdict(check))
