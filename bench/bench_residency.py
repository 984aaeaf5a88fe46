"""Weights that stay coded in memory: the time of a forward against decoded residency and the float
model, and how far its first forward raises the peak memory of a process.

    python bench/bench_residency.py

Floats are packed by `convert(model, Huffman())`, without loss; the others are rounded to integers,
and "cifarnet 34x" is the file that the whole chain gave (`recipes/cifarnet_honest34x.yaml`).
"forward MB" is what the peak grows by (Linux's VmHWM, in a process of its own) from the converted
model on: activations, and with packed residency one layer. "÷ allowed" is the packed model and that
in units of 1.2 times its bytes, the activations (what decoded residency grows by), and the largest
dense weight of a layer; of a table of embeddings only rows are decoded. "load MB" is what the peak
grows by while the packed file is loaded with packed residency, beside a float model that was there
before, "load ÷ allowed" that in units of the file and the largest weight.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, interleaved, median_ratio, merged, parser, report
from safetensors.torch import load_file
from torch import nn

import compressops as co
from compressops.zoo import vgg16
from compressops.zoo.cifarnet import CifarNet


def chain(smoke: bool) -> tuple[nn.Module, torch.Tensor]:
    """Linear layers in bfloat16: 134 MB."""
    size, depth = (64, 2) if smoke else (2048, 16)
    layers = (nn.Linear(size, size, bias=False) for _ in range(depth))
    return nn.Sequential(*layers).bfloat16(), torch.randn(16, size).bfloat16()


def vgg(smoke: bool) -> tuple[nn.Module, torch.Tensor]:
    """VGG16's convolutions in float32, of random weights: 59 MB."""
    return vgg16.vgg16(1 / 16 if smoke else 1.0), torch.randn(1, 3, *(2 * [32 if smoke else 224]))


def cifarnet(smoke: bool) -> tuple[nn.Module, torch.Tensor]:
    """CifarNet as it was trained, in float32: 5 MB."""
    del smoke
    model = CifarNet()
    model.load_state_dict(load_file(ROOT / "recipes" / "cifarnet.safetensors"))
    return model, torch.randn(1, 3, 32, 32)


def minilm(smoke: bool) -> tuple[nn.Module, dict]:
    """all-MiniLM-L6-v2 in float32, a sentence: 91 MB."""
    del smoke
    from compressops.zoo import minilm as zoo

    model, tokenizer = zoo.load()
    return model, zoo.batches(tokenizer, ["a film that moves, and never lies"], 1)[0]


def minilm_bfloat16(smoke: bool) -> tuple[nn.Module, dict]:
    model, inputs = minilm(smoke)
    return model.bfloat16(), inputs


@dataclass(frozen=True)
class Case:
    """A float model with an input, and how it is packed: by a config, or long ago to a file."""

    make: Callable[[bool], tuple[nn.Module, Any]]
    config: Any = field(default_factory=co.Huffman)
    file: Path | None = None


CASES = {
    "chain": Case(chain),
    "vgg16": Case(vgg),
    "cifarnet": Case(cifarnet),
    "cifarnet 34x": Case(cifarnet, file=ROOT / "bench/results/cifarnet_honest34x.safetensors"),
    "minilm": Case(minilm),
    "minilm bfloat16": Case(minilm_bfloat16),
    "minilm int8": Case(minilm, (co.Int(8), co.Huffman())),
    "minilm int4": Case(minilm, (co.Int(4, group_size=64), co.Huffman())),
}


def packed(name: str, model: nn.Module, residency: str) -> nn.Module:
    case = CASES[name]
    if case.file is not None:
        return co.load(case.file, model, residency=residency)
    return co.convert(model, case.config, residency=residency, prefer="size")


def largest(model: nn.Module) -> int:
    """Bytes of the largest dense weight of a layer."""
    layers = (m for m in model.modules() if not isinstance(m, nn.Embedding))
    return max(p.nbytes for layer in layers for p in layer.parameters(recurse=False))


def call(model: nn.Module, inputs: torch.Tensor | dict) -> object:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def peak(name: str, residency: str, smoke: bool) -> dict[str, int]:
    """Of this process: call it in one of its own."""
    torch.set_num_threads(1)
    model, inputs = CASES[name].make(smoke)
    model = packed(name, model.eval(), residency)
    kept = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        forward = grown_by(partial(call, model, inputs))
    if residency == "decoded":
        return {"model": kept, "forward": forward}
    float_model, _ = CASES[name].make(smoke)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        size = co.save(model, path)
        del model
        load = partial(co.load, path, float_model, residency=residency)
        load()  # imports the modules that it needs
        loading = grown_by(load)
    return {"model": kept, "forward": forward, "file": size, "load": loading}


def grown_by(function: Callable[[], object]) -> int:
    """Bytes that the process's peak grows by."""

    def high() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    # What was freed before would hide what is taken.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = high()
    function()
    return high() - before


def measured_peak(name: str, residency: str, smoke: bool) -> dict[str, int]:
    command = [sys.executable, __file__, "--peak", name, residency, *["--smoke"] * smoke]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def main() -> None:
    options = parser(__doc__, "residency-cpu")
    options.add_argument("--peak", nargs=2, help="a model and a residency: its memory, as JSON")
    options.add_argument("--only", default="", help="cases whose name has this in it")
    options.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = options.parse_args()
    if arguments.peak:
        print(json.dumps(peak(*arguments.peak, arguments.smoke)))
        return
    rows = []
    for name, case in CASES.items():
        if arguments.only not in name:
            continue
        try:
            model, inputs = case.make(arguments.smoke)
        except ImportError as missing:
            print(f"{name} not run: {missing}")
            continue
        runs = {"float": model.eval()}
        for residency in ("decoded", "packed"):
            runs[residency] = packed(name, model, residency)
        results = {how: call(run, inputs) for how, run in runs.items()}
        assert torch.equal(results["packed"], results["decoded"])
        memory = {how: measured_peak(name, how, arguments.smoke) for how in ("decoded", "packed")}
        report_of = co.report(runs["packed"]).totals
        held = memory["packed"]["model"]
        allowed = 1.2 * held + memory["decoded"]["forward"] + largest(model)
        for threads in arguments.threads[:1] if arguments.smoke else arguments.threads:
            torch.set_num_threads(threads)
            calls = {how: lambda run=run, i=inputs: call(run, i) for how, run in runs.items()}
            rounds = 1 if arguments.smoke else arguments.rounds
            seconds = interleaved(calls, rounds, 0.0)
            ms = {how: 1e3 * statistics.median(times) for how, times in seconds.items()}
            rows.append(
                {
                    "model": name,
                    "threads": threads,
                    "float ms": ms["float"],
                    "decoded ms": ms["decoded"],
                    "packed ms": ms["packed"],
                    "packed × decoded": median_ratio(seconds["packed"], seconds["decoded"]),
                    "dense MB": (report_of.dense + report_of.other) / 1e6,
                    **{f"{how} MB": memory[how]["model"] / 1e6 for how in memory},
                    **{f"{how} forward MB": memory[how]["forward"] / 1e6 for how in memory},
                    "÷ allowed": (held + memory["packed"]["forward"]) / allowed,
                    "file MB": memory["packed"]["file"] / 1e6,
                    "load MB": memory["packed"]["load"] / 1e6,
                    "load ÷ allowed": memory["packed"]["load"]
                    / (memory["packed"]["file"] + largest(model)),
                }
            )
    rows = merged(rows, arguments, ("model", "threads"))
    report("residency of packed weights", rows, arguments)


if __name__ == "__main__":
    main()
