"""Short runs of the fuzzers in tests/fuzz, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu.harness import COMPILER

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SECONDS = 15


@pytest.mark.skipif(COMPILER is None, reason="needs a C++20 compiler")
def test_huffman_decode(tmp_path: Path) -> None:
    cpu = ROOT / "csrc" / "cpu"
    sources = [
        ROOT / "tests" / "fuzz" / "huffman_decode.cpp",
        cpu / "huffman_tree.cpp",
        cpu / "cpu_features.cpp",
        *cpu.glob("huffman_*code_*.cpp"),
        *cpu.glob("crc32*.cpp"),
    ]
    fuzzer = tmp_path / "fuzz"
    flags = ("-std=c++20", "-O1", "-g", *SANITIZE, f"-I{cpu}")
    built = subprocess.run(
        [*COMPILER, *flags, *map(str, sources), "-o", str(fuzzer)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(fuzzer), str(SECONDS), "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "524448 flipped bits found" in done.stdout
