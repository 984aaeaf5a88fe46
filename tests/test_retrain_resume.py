"""Retraining that is killed, resumed or shared between processes ends with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import retrain_worker
from retrain_worker import Points, compress_images, network

from compressops.compress import Prune, Quantize, Recipe, Result, Retrain, compress
from compressops.formats import Int, Ternary
from compressops.train import checkpoint, make_accelerator, sharding, train

_RECIPES = Path(__file__).parent.parent / "recipes" / "accelerate"
# The whole of what is promised is 20; a few of them keep the suite short.
KILLS = int(os.environ.get("COMPRESSOPS_TEST_KILLS", "5"))


def _same(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key


def _start(target: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    """``target`` in a process of its own, forked from a server that has imported everything: most
    of its time is work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retrain_worker", "accelerate", "torch._dynamo"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def test_killed_at_random_points_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    workdir, out = tmp_path / "work", tmp_path / "killed.pt"

    def start(folder: Path, file: Path, pause: float) -> multiprocessing.Process:
        return _start(retrain_worker.compress_tiny, str(folder), str(file), pause)

    start(tmp_path / "warm", tmp_path / "warm.pt", 0.0).join()
    began = time.monotonic()
    reference = start(tmp_path / "reference", tmp_path / "reference.pt", 0.001)
    reference.join()
    whole = time.monotonic() - began
    assert reference.exitcode == 0
    chance = random.Random(time.time_ns())
    places, kills = set(), 0
    while kills < KILLS:
        if out.exists():
            workdir, out = tmp_path / f"work{kills}", tmp_path / f"killed{kills}.pt"
        process = start(workdir, out, 0.001)
        # Short of a whole run, so that several kills hit one; some hit the start, and some the end.
        process.join(timeout=chance.uniform(0, 0.6 * whole))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            for path in workdir.glob("*.partial.pt"):
                places.add((path.name, checkpoint.load(path)["step"]))
        else:
            assert process.exitcode == 0
    if not out.exists():
        start(workdir, out, 0.0).join()
    intact = torch.load(tmp_path / "reference.pt")
    for file in tmp_path.glob("killed*.pt"):
        killed = torch.load(file)
        _same(killed["model"], intact["model"])
        for mine, its in zip(killed["history"], intact["history"], strict=True):
            assert [row["loss"] for row in mine] == [row["loss"] for row in its]
    assert out.exists()
    assert not list(tmp_path.glob("work*/*.partial.pt"))
    print(f"{kills} kills, {len(places)} places within a stage to go on from")


def test_resuming_skips_what_was_done(tmp_path: Path) -> None:
    """A checkpoint in the middle of an epoch, by its time; the data before it is not read again."""
    seen: list[int] = []

    class Watched(Points):
        def __getitem__(self, index: int):
            seen.append(index)
            if len(seen) == 5 * 16 + 1:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    path = tmp_path / "c.pt"
    options = Retrain(epochs=1, batch_size=16, lr=0.05, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train(network(), Watched(160), options, accelerator=make_accelerator(), checkpoint=path)
    assert checkpoint.load(path)["step"] == 5
    resumed, whole = network(), network()
    train(resumed, Watched(160), options, accelerator=make_accelerator(), checkpoint=path)
    assert sorted(seen[:80] + seen[81:]) == list(range(160))
    train(whole, Points(160), options, accelerator=make_accelerator())
    _same(resumed.state_dict(), whole.state_dict())


def test_checkpoints_are_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"value": 1})

    def broken(*args):
        raise OSError("disk full")

    for place in ("fsync", "replace"):
        monkeypatch.setattr(os, place, broken)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(path, {"value": 2})
        monkeypatch.undo()
        assert checkpoint.load(path)["value"] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.save(path, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99, this version reads 2"):
        checkpoint.load(path)


def test_a_damaged_checkpoint_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"value": torch.arange(50.0)})
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"checkpoint {path} cannot be read"):
            checkpoint.load(path)
    path.write_bytes(content)
    assert torch.equal(checkpoint.load(path)["value"], torch.arange(50.0))


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    (tmp_path / f".{path.name}.0123456789abcdef.tmp").write_bytes(b"half")
    others = {".d.pt.0123456789abcdef.tmp", "mine.tmp", ".c.pt.partial.0123456789abcdef.tmp"}
    for name in others:
        (tmp_path / name).write_bytes(b"half")
    options = Retrain(steps=1, batch_size=16)
    train(network(), Points(32), options, accelerator=make_accelerator(), checkpoint=path)
    assert {p.name for p in tmp_path.iterdir()} == {"c.pt", *others}
    # A run that has nothing left to do cleans up too.
    work = tmp_path / "work"
    compress(network(), Recipe([Prune(0.5)]), workdir=work, log=False)
    (last,) = work.glob("stage-01-*.pt")
    (work / f".{last.name}.0123456789abcdef.tmp").write_bytes(b"half")
    compress(network(), Recipe([Prune(0.5)]), workdir=work, log=False)
    assert not list(work.glob(".*.tmp"))


def _shared(kind: str, folder: Path) -> tuple[dict, Result]:
    """What two processes make, by the configuration shipped for ``kind``, and what one does.

    Two others, of which one is killed midway, end with the same bits when they are started again.
    """
    whole, killed = str(folder / "whole"), str(folder / "killed")

    def start(kill: bool) -> list[multiprocessing.Process]:
        port = random.randrange(20000, 40000)
        return [
            _start(retrain_worker.share_alone, kind, killed, rank, port, kill and rank == 1)
            for rank in (0, 1)
        ]

    launched = subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"),
            *("--config_file", str(_RECIPES / f"{kind}.yaml")),
            *("--main_process_port", str(random.randrange(40000, 60000))),
            *(retrain_worker.__file__, kind, whole),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    first, second = start(kill=True)
    second.join()
    assert second.exitcode == -signal.SIGKILL
    first.kill()
    first.join()
    for process in start(kill=False):
        process.join()
        assert process.exitcode == 0
    _, errors = launched.communicate(timeout=300)
    assert launched.returncode == 0, errors
    states = [torch.load(f"{name}.{rank}") for name in (whole, killed) for rank in (0, 1)]
    for state in states:
        assert state["world"] == 2
        _same(state["model"], states[0]["model"])
    for state in states[2:]:
        # It went on in the midst of the last stage.
        assert state["first_steps"][0] in (2, 3)
    one = compress_images(getattr(retrain_worker, f"{kind}_recipe")(), str(folder / "one"))
    for path in (whole, killed, folder / "one"):
        assert len(list(Path(path).glob("stage-*.pt"))) == 5
    for mine, its in zip(states[0]["history"], one.history, strict=True):
        for row, wanted in zip(mine, its, strict=True):
            assert row["LogitsKD"] > 0
            # A process reports the losses of its own share of a batch.
            assert row["loss"] == pytest.approx(wanted["loss"], rel=0.2)
    return states[0], one


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    first, one = _shared("ddp", tmp_path)
    assert not any(first["sharded"])
    _near_after_sgd(tmp_path)
    # Then the inputs' ranges follow one process's share of each batch.
    for key, value in one.model.state_dict().items():
        if key.endswith("range"):
            torch.testing.assert_close(first["model"][key], value, rtol=0.2, atol=0.1)
    assert len(first["rows"]) == len(one.table) == 5
    for mine, its in zip(first["rows"][:4], one.table, strict=False):
        assert mine == pytest.approx((its.top1, its.top5))


def test_two_processes_that_share_the_weights_compute_what_one_does(tmp_path: Path) -> None:
    first, one = _shared("fsdp", tmp_path)
    assert first["sharded"]
    assert all(first["sharded"])
    _near_after_sgd(tmp_path)
    for key, value in one.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            # Where a gradient is about 0, Adam's step has either sign.
            far = (first["model"][key].float() - value.float()).abs() > 2e-6
            assert far.float().mean() < 0.01


def _near_after_sgd(folder: Path) -> None:
    """After pruning and the first training, the order of sums is all that differs."""
    paths = [next((folder / name).glob("stage-02-*.pt")) for name in ("whole", "one")]
    theirs, ours = (checkpoint.load(path)["model"] for path in paths)
    assert list(theirs) == list(ours)
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=2e-6)


def test_what_needs_whole_weights_is_refused_under_fsdp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sharding.FSDP_VARIABLE, "true")

    class Two:
        num_processes, process_index, is_main_process = 2, 0, True

        def __init__(self, mixed_precision: str = "no") -> None:
            self.mixed_precision = mixed_precision

    retrain = Retrain(steps=1, batch_size=24)
    for stages, message in (
        ([Retrain(steps=1, batch_size=24, optimizer="muon")], r"1 \(.*optimizer='muon' .*FSDP"),
        ([Retrain(steps=1, batch_size=24, ema=0.9)], r"1 \(.*ema=0.9 .*FSDP"),
        ([Prune(0.4, schedule="cubic"), retrain], r"2 \(.*FSDP.*got Prune\(density=0.4, "),
        ([Quantize(Int(6)), retrain, retrain], r"2 \(.*FSDP.*got Quantize\(number=Int\(bits=6\)\)"),
    ):
        with pytest.raises(ValueError, match=f"stage {message}"):
            compress(network(), Recipe(stages), Points(48), log=False, accelerator=Two())
    quantized = compress(network(), Recipe([Quantize(Ternary())]), log=False).model
    with pytest.raises(ValueError, match="FSDP, but DDP: got the quantized model that was given"):
        compress(quantized, Recipe([retrain]), Points(48), log=False, accelerator=Two())
    with pytest.raises(ValueError, match="mixed_precision='fp16' does not go with FSDP"):
        compress(network(), Recipe([retrain]), Points(48), log=False, accelerator=Two("fp16"))


def test_a_checkpoint_under_fsdp_is_not_taken_for_another(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"sharded": True})
    with pytest.raises(ValueError, match=f"checkpoint {path} was written under FSDP; go on so"):
        train(
            network(),
            Points(32),
            Retrain(steps=1, batch_size=16),
            accelerator=make_accelerator(),
            checkpoint=path,
        )


def test_a_launch_that_trains_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    make_accelerator()
    # What accelerate launch --cpu --num_processes 2 leaves to MPI.
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="or torchrun --nproc_per_node N"):
        make_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="started 2 processes, and Accelerate trains in 1 on cpu"):
        make_accelerator()
