"""A BERT of MiniLM's shape in 2-2-8, in 8-8-8 and in blocks: time and peak memory.

    python bench/bench_bert_speed.py [--blocks runs/bert/minilm_blocks.safetensors]
    python bench/bench_bert_speed.py --memory --out FILE   # peaks alone: any load will do

Random weights, which neither time nor memory depends on; 64 tokens a sentence. × are times faster
than the float model. What attention multiplies is rounded to 8 bits, as recipes/minilm_ternary.yaml
and minilm_int8.yaml have it, but in those called "…, float attention". "peak MiB" is the growth of
a new process's resident memory, at its highest, from before the model's file is loaded to after one
call; a small model of the same kind was loaded and called before. "mapped" is the same with glibc
told to map every block of 128 KB and more (MALLOC_MMAP_THRESHOLD_=131072), so that what is freed is
given back: glibc 2.36 leaves holes between aligned blocks, which the next of the same size does not
fit into. All are loaded by mapping their files into models without weights: the float one by the
safetensors library, packed ones by `compressops.load`. Times and ratios are of all models in one
process.

"blocks" is the file that `bench/bert_sst2.py minilm_blocks` trains; without it, random weights with
a fifth of the encoder's blocks of 16 outputs × 1 input. Each case times what `convert` makes of it
there: "block-sparse" are the layers for which that was measured faster, "break-even" the least of
their densities at which it would not be.
"""

from __future__ import annotations

import copy
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_blocks_convert import BLOCK, trained
from common import interleaved, median_ratio, parser, report
from torch import nn

import compressops as co
from compressops.compress import Prune
from compressops.model_state import packed_modules

SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
SMOKE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
NUMBERS = {
    "2-2-8": (co.Ternary("tensor"), co.Ternary("row")),
    "8-8-8": (co.Int(bits=8), co.Int(bits=8)),
}
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
FLOAT_ATTENTION = ", float attention"
PACKED = [*NUMBERS, *(name + FLOAT_ATTENTION for name in NUMBERS), "blocks"]
TOKENS = 64


def build(shape: dict) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**shape)).eval()


def variant(model: nn.Module, name: str) -> nn.Module:
    """What ``model`` is in the file of this name."""
    if name == "float":
        return model
    if name == "blocks":
        return co.convert(pruned(model), prefer="size")
    number, embedding = NUMBERS[name.removesuffix(FLOAT_ATTENTION)]
    config = {
        "bert.embeddings.word_embeddings": embedding,
        "bert.embeddings.*": None,
        "classifier": None,
        "*": number,
    }
    if not name.endswith(FLOAT_ATTENTION):
        model = copy.deepcopy(model)
        co.QuantizeAttention(co.Int(bits=8, symmetric=False)).attach(model)
    return co.convert(model, config, prefer="size")


def pruned(model: nn.Module) -> nn.Module:
    """``model`` with a fifth of its encoder's blocks."""
    model, layers = copy.deepcopy(model), "bert.encoder.*"
    Prune(density=0.2, granularity="block", block=BLOCK, layers=layers).attach(model)
    return model


def in_blocks(model: nn.Module, inputs: dict) -> nn.Module:
    config = {"bert.encoder.*": co.BlockSparse(BLOCK), "*": None}
    return co.convert(model, config, example_inputs=inputs)


def became(model: nn.Module) -> dict:
    """How much of the encoder's weights is stored, and what runs it."""
    layers = [layer for layer in co.report(model).layers if layer.name.startswith("bert.encoder.")]
    sparse = [layer for layer in layers if layer.became == "BlockSparseLinear"]
    stored = sum(layer.density * math.prod(layer.shape) for layer in layers)
    evens = [float(re.search(r"break-even ([\d.]+)%", layer.why)[1]) for layer in sparse]
    return {
        "density %": 100 * stored / sum(math.prod(layer.shape) for layer in layers),
        "block-sparse": f"{len(sparse)} of {len(layers)}",
        "break-even %": min(evens, default=None),
    }


def batch(shape: dict, size: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(size * TOKENS).view(size, TOKENS) * 7 % shape.get("vocab_size", 30522)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def peak(path: Path, name: str, shape: dict, size: int) -> float:
    """MiB by which this process's resident memory grows while it loads a file and runs it."""
    from accelerate import init_empty_weights

    def loaded(path: Path, model: nn.Module) -> nn.Module:
        if name != "float":
            return co.load(path, model, inplace=True, mmap=True)
        model.load_state_dict(load_file(path), assign=True)
        return model

    from safetensors.torch import load_file

    # What the first call of anything takes is not the model's.
    with tempfile.TemporaryDirectory() as folder:
        small = build(SMOKE)
        write(variant(small, name), Path(folder) / "small.safetensors")
        loaded(Path(folder) / "small.safetensors", small)(**batch(SMOKE, 1))
    with init_empty_weights():
        model = build(shape)
    inputs = batch(shape, size)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    loaded(path, model)(**inputs)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measured_peak(path: Path, name: str, shape: dict, size: int, **environment: str) -> float:
    code = (
        f"import torch, bench_bert_speed as b; torch.set_num_threads(1); "
        f"print(b.peak(b.Path({str(path)!r}), {name!r}, {shape!r}, {size}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | environment,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return float(done.stdout.split()[-1])


@torch.no_grad()
def main() -> None:
    options = parser(__doc__, "bert_speed-cpu")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    options.add_argument("--packed", nargs="+", choices=PACKED, default=PACKED)
    options.add_argument("--blocks", type=Path, help="file of a trained model in blocks")
    options.add_argument("--memory", action="store_true", help="peaks alone, and no times")
    arguments = options.parse_args()
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as missing:
        if arguments.smoke:
            print(f"not run: {missing}")
            return
        raise
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    shape = SMOKE if arguments.smoke else SHAPE
    given = build(shape)
    models: dict[str, Any] = {name: variant(given, name) for name in ("float", *arguments.packed)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.safetensors" for name in models}
        if "blocks" in models and arguments.blocks:
            paths["blocks"] = arguments.blocks
        for name, model in models.items():
            if paths[name].parent == Path(folder):
                write(model, paths[name])
        if "blocks" in models:
            plain = trained(paths["blocks"], given)
        for size in [2] if arguments.smoke else arguments.batch:
            peaks: dict[str, tuple[float, float]] = {}
            if arguments.memory or arguments.smoke:
                for name, path in paths.items():
                    case = path, name, shape, size
                    peaks[name] = measured_peak(*case), measured_peak(*case, **MAPPED)
            if arguments.memory:
                rows += [{"batch": size, **memory(name, paths, peaks)} for name in paths]
                continue
            inputs = batch(shape, size)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                if "blocks" in models:
                    models["blocks"] = in_blocks(plain, inputs)
                notes = {name: became(model) for name, model in models.items()}
                calls = {n: lambda m=m, i=inputs: m(**i) for n, m in models.items()}
                seconds = interleaved(calls, 2 if arguments.smoke else max(15, arguments.rounds))
                rows += [
                    {
                        **{"batch": size, "threads": threads, "model": name},
                        "ms": statistics.median(seconds[name]) * 1e3,
                        "× float": median_ratio(seconds["float"], seconds[name]),
                        **(memory(name, paths, peaks) if peaks else {}),
                        **notes[name],
                    }
                    for name in models
                ]
    report("BERT of MiniLM's shape, 64 tokens (CPU)", rows, arguments)


def memory(
    name: str, paths: dict[str, Path], peaks: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    (here, mapped), (float_here, float_mapped) = peaks[name], peaks["float"]
    return {
        "model": name,
        "file bytes": paths[name].stat().st_size,
        "peak MiB": here,
        "peak, part of float": here / float_here,
        "mapped MiB": mapped,
        "mapped, part of float": mapped / float_mapped,
    }


def write(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    if packed_modules(model):
        co.save(model, path)
    else:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


if __name__ == "__main__":
    main()
