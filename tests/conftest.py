"""Shared by all tests: few threads, fixed seeds, the grids of backends and instruction sets, and
times that are made up.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

# Several processes share the tests: threads that spin for work would take another one's turn.
# OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton reads this when it is imported: where no GPU is, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The programs that tests run in this process would change its memory for all other tests.
os.environ.setdefault("COMPRESSOPS_KEEP_MEMORY", "0")

from hypothesis import settings

from compressops import backends, kernels

settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("suite")

ISAS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_vbmi2")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """torch.compile counts how often it compiles a function, over all tests, and stops at eight."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def kernel_params(op: str) -> list:
    """One test parameter for every kernel of ``op`` that can run here: ``(device, backend, isa)``.

    The CPU library counts once for each instruction set that the processor has.
    """
    params = []
    for name, device, backend, reason in backends.table():
        if name != op or reason is not None:
            continue
        if backend == "cpu":
            params += [
                pytest.param((device, backend, isa), id=f"{device}-{backend}-{isa}")
                for isa in ISAS
                if isa == "baseline" or _has(isa)
            ]
        else:
            params.append(pytest.param((device, backend, None), id=f"{device}-{backend}"))
    return params


def _has(isa: str) -> bool:
    from compressops import _C

    _C.limit_isa("native")
    return _C.cpu_features()[isa]


@contextlib.contextmanager
def serving(device: str, backend: str, isa: str | None) -> Iterator[torch.device]:
    """Within the ``with`` block the backend (and instruction set) of a `kernel_params` parameter
    serves. Gives the device that tensors must be on."""
    with backends.backend(backend):
        if isa is None:
            yield torch.device(device)
            return
        from compressops import _C

        _C.limit_isa(isa)
        try:
            yield torch.device(device)
        finally:
            _C.limit_isa("native")


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Of an indirect ``kernel_params`` parameter: see `serving`."""
    with serving(*request.param) as device:
        yield device


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], list]:
    """Sets what `convert` measures of Winograd layers: ``speed(layer, tile)`` is how many times
    faster than direct, in all rounds or in each. Gives the list of what was measured."""

    def set_speeds(speed: Callable[[str, int], float | list[float]]) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        direct_seconds = 100e-6

        def fake(
            model: torch.nn.Module,
            layers: Mapping[str, torch.nn.Module],
            variants: Mapping[str, Sequence[Callable]],
            inputs: Any,
        ) -> dict[str, list[list[float]]]:
            out = {}
            for name, (direct, ours) in variants.items():
                tile = ours.__self__.winograd.tile
                assert getattr(direct.__self__, "winograd", None) is None
                seen.append((name, tile))
                factor = speed(name, tile)
                factors = factor if isinstance(factor, list) else [factor] * 8
                out[name] = [[direct_seconds] * len(factors), [direct_seconds / f for f in factors]]
            return out

        monkeypatch.setattr(kernels, "times_in_place", fake)
        return seen

    # Also where no library is compiled.
    monkeypatch.setattr("compressops.backends.name", lambda op, device: "cpu")
    return set_speeds
