"""Every benchmark still runs: once, tiny, and without writing a result."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressops.schema import SCHEMAS

BENCH = Path(__file__).resolve().parent.parent / "bench"
README = BENCH.parent / "README.md"


@pytest.mark.parametrize("script", sorted(BENCH.glob("bench_*.py")), ids=lambda path: path.stem)
def test_smoke(script: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(script), "--smoke", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not out.exists()


def test_gpu_verify_runs_its_parity_on_what_is_there() -> None:
    command = [sys.executable, str(BENCH / "gpu_verify.py"), "--smoke"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The interpreter takes minutes over these cases, and the ops' own tests run it over theirs.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    for op in SCHEMAS:
        if (BENCH.parent / "csrc" / "cuda" / f"{op}.cu").exists():
            assert op in done.stdout


def test_gpu_verify_says_nothing_of_cases_that_did_not_run() -> None:
    command = [sys.executable, str(BENCH / "gpu_verify.py"), "--ops", "int8_linear"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--steps", "parity", "--total-seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "parity of int8_linear: cut short" in done.stdout, done.stderr
    assert "largest difference" not in done.stdout


def test_the_table_shows_every_row() -> None:
    command = [sys.executable, str(BENCH / "cifarnet_table.py"), "show"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") == 7
    assert done.stdout in README.read_text(encoding="utf-8")


def test_a_merged_result_names_the_commands_of_all_its_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import common

    arguments = argparse.Namespace(merge=True, out=tmp_path / "result.json", rounds=15)
    for case, value in (("a", 1), ("b", 2), ("a", 3)):
        monkeypatch.setattr(sys, "argv", ["/a/folder/bench_op.py", "--merge", "--only", case])
        rows = common.merged([{"case": case, "value": value}], arguments, ("case",))
        common.write("op", rows, arguments)
    result = json.loads(arguments.out.read_text())
    assert result["rows"] == [{"case": "b", "value": 2}, {"case": "a", "value": 3}]
    command = "python bench/bench_op.py --merge --only"
    assert result["command"] == f"{command} b && {command} a"


def test_merged_rows_may_have_other_columns(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import common

    arguments = argparse.Namespace(merge=True, out=tmp_path / "result.json", rounds=15)
    trained = {"steps": 100, "lr": 0.1, "error": 2}
    rows = []
    for row in ({"steps": 0, "error": 1}, trained, {"steps": 100, "lr": 0.2, "error": 3}):
        rows.append(row)
        keys = tuple(key for key in row if key != "error")
        common.write("op", common.merged(rows, arguments, keys), arguments)
    again = {"steps": 100, "lr": 0.1, "error": 4}
    found = common.merged([again], arguments, ("steps", "lr"))
    assert found == [rows[0], rows[2], again]
