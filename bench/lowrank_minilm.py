"""all-MiniLM-L6-v2 with its linear layers factorized, before and after distillation from itself.

    python bench/lowrank_minilm.py --workdir RUNS

`compressops/zoo/minilm.py` and `compressops/zoo/sentiment.py` say what to install. The factors are
calibrated on sentences of reviews, and then trained on the same ones, without labels, for the float
model's embeddings and hidden states. "output error" is the relative error of the embeddings of
SST-2's development set, "layer error" (root mean square) that of each factorized layer's output for
the float model's inputs. Multiply-accumulates are those of the linear layers. × are times faster
than in float32, over batches of 32 sentences of all lengths; what runs is chosen by measuring. A
run that was killed goes on where it stopped.
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import torch
from common import interleaved, median_ratio, parser, report
from torch import nn

import compressops as co
from compressops.compress.parametrizations import Factors, find
from compressops.train.memory import keep_freed_memory
from compressops.zoo import minilm, sentiment


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def multiply_accumulates(model: nn.Module) -> int:
    """Of all linear layers, for a token."""
    parts = ((find(m, Factors), m.weight) for m in linears(model).values())
    return sum(
        weight.numel() if part is None else part.layout.macs(tuple(weight.shape))
        for part, weight in parts
    )


def one_rank(model: nn.Module, part: float) -> co.Factorize:
    """Every layer keeps the same part of its own products."""
    ranks = []
    for name, module in linears(model).items():
        rows, columns = module.weight.shape
        rank = max(8, int(part * rows * columns / (rows + columns)) // 8 * 8)
        ranks.append((name, "matrix", rank))
    return co.Factorize(ranks=tuple(ranks), calibration=4)


def embeddings(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    return torch.cat([model(**batch) for batch in batches])


def layer_error(model: nn.Module, ours: nn.Module, batch: dict) -> float:
    """Root mean square over the factorized layers of their relative errors."""
    found: list[float] = []
    mine = linears(ours)

    def compare(name: str):
        def look(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
            found.append(((mine[name](args[0]) - output).norm() / output.norm()).item())

        return look

    handles = [
        module.register_forward_hook(compare(name))
        for name, module in linears(model).items()
        if find(mine[name], Factors) is not None
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return statistics.mean(error**2 for error in found) ** 0.5


def compressed(model: nn.Module, stages: list, data: object, workdir: Path) -> nn.Module:
    torch.set_num_threads(1)
    return co.compress(model, co.Recipe(stages), data, teacher=model, workdir=workdir).model


@torch.no_grad()
def main() -> None:
    out = parser(__doc__, "lowrank_minilm")
    out.add_argument("--macs", type=float, default=0.495)
    out.add_argument("--steps", type=int, default=250, help="of 32 sentences")
    out.add_argument("--workdir", type=Path, required=True)
    arguments = out.parse_args()
    keep_freed_memory()
    model, tokenizer = minilm.load()
    train, _ = sentiment.datasets()
    dev, _ = minilm.sst2_dev()
    budget = co.Factorize(macs=arguments.macs, calibration=4)
    uniform = one_rank(model, arguments.macs)
    retrain = co.Retrain(
        steps=arguments.steps,
        batch_size=32,
        optimizer="adamw",
        lr=1e-3,
        warmup=0.1,
        schedule="linear",
        ce_weight=0.0,
        # An embedding has the length 1, its 384 entries are small.
        distill=(co.HiddenStateKD(), co.LogitsKD(kind="mse", temperature=1.0, weight=768.0)),
    )
    chains = {
        "budget": [budget],
        "same part": [uniform],
        f"same part, {arguments.steps} steps": [uniform, retrain],
    }
    held = minilm.batches(tokenizer, dev, 32)
    middle = held[len(held) // 2]
    expected = embeddings(model, held)
    models, notes = {"float32": model}, {"float32": {"× fewer MACs": 1.0}}
    for name, stages in chains.items():
        with torch.enable_grad():
            cut = compressed(model, stages, train, arguments.workdir)
        found = embeddings(cut, held)
        notes[name] = {
            "× fewer MACs": multiply_accumulates(model) / multiply_accumulates(cut),
            "output error": ((found - expected).norm() / expected.norm()).item(),
            "cosine": (found * expected).sum(1).mean().item(),
            "layer error": layer_error(model, cut, middle),
        }
    runs = {"factors": (cut, None), "factors, int8": (cut, co.Int(bits=8))}
    runs["int8"] = (model, co.Int(bits=8))
    for name, (source, config) in runs.items():
        models[name] = co.convert(
            source,
            config,
            filter_fn=lambda module, _: isinstance(module, nn.Linear),
            example_inputs=middle,
        )
        found = embeddings(models[name], held)
        error = ((found - expected).norm() / expected.norm()).item()
        notes[name] = {"output error": error, "cosine": (found * expected).sum(1).mean().item()}
    rows = [{"model": name, **notes[name]} for name in chains]
    timed = held[:: max(1, len(held) // 6)]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        calls = {name: lambda m=m: embeddings(m, timed) for name, m in models.items()}
        seconds = interleaved(calls, arguments.rounds)
        for name, found in models.items():
            kinds = Counter(
                type(m).__name__ for m in found.modules() if "Linear" in type(m).__name__
            )
            rows.append(
                {
                    **{"threads": threads, "model": name, **notes[name]},
                    "ms": statistics.median(seconds[name]) * 1e3,
                    "× float32": median_ratio(seconds["float32"], seconds[name]),
                    "layers": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
                }
            )
    report("all-MiniLM-L6-v2 factorized, SST-2 dev (CPU)", rows, arguments)


if __name__ == "__main__":
    main()
