"""keep_freed_memory: fewer page faults, the same results, and ways out."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from compressops.train import memory

glibc = pytest.mark.skipif(not memory._is_glibc(), reason="the C library is not glibc")

# Allocates and frees 64 MB as a training step does, again and again.
SCRIPT = """
import hashlib, json, resource, sys, torch
from compressops.train import keep_freed_memory
done = keep_freed_memory() if "keep" in sys.argv else None
torch.set_num_threads(1)
torch.manual_seed(0)
digest = hashlib.sha256()
for i in range(13):
    if i == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.rand(16, 1 << 20)
    digest.update(x[:, ::4096].contiguous().numpy().tobytes())
    del x
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"done": done, "faults": faults, "digest": digest.hexdigest()}))
"""


def run(*arguments: str, **environment: str) -> dict:
    cleared = {k: v for k, v in os.environ.items() if k not in (memory.VARIABLE, *memory._OTHERS)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**cleared, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100,
    )
    return json.loads(done.stdout)


@glibc
def test_blocks_are_kept_and_results_are_the_same() -> None:
    before, after = run(), run("keep")
    assert after["done"] is True
    # Ten times 64 MB: 163,840 pages of 4 KB, or 320 of 2 MB.
    assert before["faults"] > 100
    # Small blocks can split a freed one: the next does not fit, and the heap grows once more.
    assert after["faults"] < 0.25 * before["faults"]
    assert after["digest"] == before["digest"]


@glibc
@pytest.mark.parametrize(
    ("variable", "value"),
    [("COMPRESSOPS_KEEP_MEMORY", "0"), ("MALLOC_TRIM_THRESHOLD_", "1000000")],
)
def test_the_environment_decides(variable: str, value: str) -> None:
    found = run("keep", **{variable: value})
    assert found["done"] is False
    assert found["faults"] > 100


@pytest.mark.parametrize("version", [None, "musl 1.2", OSError])
def test_other_libraries_are_left_alone(version, monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> str:
        if version is OSError:
            raise OSError
        return version

    monkeypatch.setattr(memory.os, "confstr", confstr)
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    for name in (memory.VARIABLE, *memory._OTHERS):
        monkeypatch.delenv(name, raising=False)
    assert memory.keep_freed_memory() is False


def test_an_old_glibc_maps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return int(parameter != memory._M_MMAP_THRESHOLD)

    monkeypatch.setattr(memory, "_is_glibc", lambda: True)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    for name in (memory.VARIABLE, *memory._OTHERS):
        monkeypatch.delenv(name, raising=False)
    assert memory.keep_freed_memory() is True
    assert calls == [(-3, 2**31 - 1), (-4, 0), (-1, -1)]
