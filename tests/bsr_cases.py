"""Block-sparse weights for the tests of the ops on them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import kernel_params

import compressops as co


@dataclass(frozen=True)
class Case:
    """``m`` rows times a weight ``[n, k]`` that keeps ``density`` of its blocks."""

    m: int
    k: int
    n: int
    block: tuple[int, int] = (16, 16)
    density: float = 0.4
    dtype: torch.dtype = torch.float32
    values_dtype: torch.dtype | None = None
    bias: bool = True
    activation: str = "none"

    def keep(self) -> torch.Tensor:
        """Which blocks are stored; where there are several rows, one is empty and one is full."""
        rows, columns = -(-self.n // self.block[0]), -(-self.k // self.block[1])
        keep = torch.rand(rows, columns) < self.density
        if rows > 2 and 0 < self.density < 1:
            keep[rows // 2], keep[-1] = False, True
        return keep


CASES = [
    *(Case(m, k, n) for m in (0, 1, 7) for k in (0, 1, 16, 40) for n in (0, 1, 16, 50)),
    *(Case(m, 100, 70) for m in (2, 3, 5, 8, 13, 16, 17, 31, 33, 48, 49, 64, 80, 97)),
    *(Case(m, 150, 140, (b, b)) for m in (1, 20) for b in (1, 2, 4, 8, 16, 32, 64, 128)),
    *(Case(m, 90, 70, block) for m in (1, 6, 50) for block in ((1, 16), (16, 1), (24, 5), (3, 7))),
    *(Case(m, 64, 64, (32, 16), density) for m in (1, 33) for density in (0.0, 0.1, 1.0)),
    *(Case(m, 70, 50, dtype=dt) for m in (1, 37) for dt in (torch.float16, torch.bfloat16)),
    *(Case(m, 70, 50, values_dtype=dt) for m in (1, 37) for dt in (torch.float16, torch.bfloat16)),
    *(Case(m, 40, 50, activation=name) for m in (1, 20) for name in ("relu", "gelu")),
    Case(3, 40, 24, bias=False),
    Case(5, 40, 50, dtype=torch.bfloat16, activation="gelu"),
    # More strips of a single row than are multiplied at once.
    *(Case(1, 90, 587, activation=name) for name in ("none", "relu", "gelu")),
    Case(1, 90, 587, dtype=torch.bfloat16, activation="gelu"),
]
# Triton's interpreter is slow, and takes its time by the program.
INTERPRETED = [
    *(Case(m, k, n) for m, k, n in ((0, 40, 50), (7, 0, 50), (7, 40, 0), (1, 1, 1), (65, 40, 50))),
    *(Case(5, 150, 140, (b, b)) for b in (8, 32, 64, 128)),
    *(Case(18, 45, 70, block) for block in ((1, 16), (16, 4), (16, 1), (24, 20), (3, 8), (64, 48))),
    *(Case(3, 64, 64, (32, 16), density, bias=False) for density in (0.0, 1.0)),
    *(Case(37, 70, 50, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(3, 40, 50, values_dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(3, 40, 50, activation=name) for name in ("relu", "gelu")),
    Case(5, 40, 50, dtype=torch.bfloat16, activation="gelu"),
]
LARGE = [
    *(Case(m, 1031, 519, (32, 32), 0.2) for m in (60, 130)),  # threads share panels, or have some
    Case(1, 3000, 2000, (64, 16)),
    Case(300, 40, 33),
]


def grid(op: str, cases: list, interpreted: list | None = None) -> pytest.MarkDecorator:
    """Parameters kernel and case: every kernel of the op on all cases, one that Triton's
    interpreter runs on those of its own, by default such of bsr_linear as the op can take."""
    quads = op == "bsr_int8_linear"
    if interpreted is None:
        interpreted = [case for case in INTERPRETED if not quads or case.block[1] % 4 == 0]
    return pytest.mark.parametrize(
        ("kernel", "case"),
        [
            pytest.param(*kernel.values, case, id=f"{case}-{kernel.id}")
            for kernel in kernel_params(op)
            for case in (interpreted if kernel.values[0][:2] == ("cpu", "triton") else cases)
        ],
        indirect=["kernel"],
    )


def make(case: Case, device: torch.device, pack: bool = False) -> tuple:
    """The arguments of bsr_linear."""
    x = torch.randn(case.m, case.k, device=device).to(case.dtype)
    weight = torch.randn(case.n, case.k).to(case.values_dtype or case.dtype).to(device)
    bsr = co.ops.bsr_from_dense(weight, case.block, case.keep().to(device))
    if pack:
        bsr = co.ops.bsr_linear_pack(*bsr, case.n, case.k)
    bias = torch.randn(case.n, device=device) if case.bias else None
    return (x, *bsr, case.n, bias, case.activation)
