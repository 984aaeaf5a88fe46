"""all-MiniLM-L6-v2 on SST-2's 872 development sentences: what `convert` makes of it, against the
float model and torch.ao's dynamic int8 quantization. 4 bits are fitted to MRPC's sentences.

    python bench/bench_minilm.py

`compressops/zoo/minilm.py` says what to install. "cosine" is the mean of the cosines between the
sentences' embeddings and the float model's, over all of them; × are times faster than that peer,
over batches of all lengths.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections import Counter

import torch
from common import interleaved, median_ratio, merged, parser, report
from torch import nn

import compressops as co
from compressops.zoo import minilm


def dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )


def embeddings(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    return torch.cat([model(**batch) for batch in batches])


def linears(model: nn.Module) -> str:
    kinds = Counter(type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


@torch.no_grad()
def main() -> None:
    options = parser(__doc__, "minilm-cpu")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    options.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = options.parse_args()
    try:
        model, tokenizer = minilm.load()
        sentences, _ = minilm.sst2_dev()
    except ImportError as missing:
        if arguments.smoke:
            print(f"not run: {missing}")
            return
        raise
    texts = minilm.mrpc_dev()
    calibration = minilm.batches(tokenizer, texts[:16] if arguments.smoke else texts, 16)
    # Fitted once; GPTQ rounds each weight so that what the ones before it did wrong is made good.
    gptq = co.Calibrate(calibration, weights="gptq", activation_order=True)
    affine = co.Int(bits=4, group_size=64, symmetric=False)
    configs = {
        "int8": (co.Int(bits=8), None),
        "int4 g64, nearest": (affine, None),
        "int4 g64, GPTQ": (affine, gptq),
    }
    example = calibration[len(calibration) // 2]
    models = {"float": model, "torch.ao dynamic int8": dynamic(model)}
    for name, (config, fitted) in configs.items():
        # Of the linear layers: look-ups of embeddings stay as they are.
        models[name] = co.convert(
            model,
            config,
            filter_fn=lambda module, _: isinstance(module, nn.Linear),
            example_inputs=example,
            calibration=fitted,
        )
    chosen = sentences[:16] if arguments.smoke else sentences
    whole = minilm.batches(tokenizer, chosen, 32)
    expected = embeddings(model, whole)
    cosines = {n: (embeddings(found, whole) * expected).sum(1) for n, found in models.items()}
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for size in [8] if arguments.smoke else arguments.batch:
            batches = minilm.batches(tokenizer, chosen, size)
            # Of all lengths, but not all of them: 15 rounds would take an hour.
            timed = batches[:: max(1, len(batches) // (10 if size > 1 else 50))]
            rounds = 2 if arguments.smoke else max(15, arguments.rounds)
            calls = {n: lambda m=m, t=timed: embeddings(m, t) for n, m in models.items()}
            seconds = interleaved(calls, rounds)
            for name, found in models.items():
                rows.append(
                    {
                        **{"threads": threads, "batch": size, "model": name},
                        "ms": statistics.median(seconds[name]) * 1e3,
                        "× float": median_ratio(seconds["float"], seconds[name]),
                        "× torch.ao": median_ratio(seconds["torch.ao dynamic int8"], seconds[name]),
                        "cosine": cosines[name].mean().item(),
                        "least cosine": cosines[name].min().item(),
                        "linear layers": linears(found),
                    }
                )
            print(rows[-len(models) :], flush=True)
    rows = merged(rows, arguments, ("threads", "batch", "model"))
    report("all-MiniLM-L6-v2, SST-2 dev (CPU)", rows, arguments)


if __name__ == "__main__":
    main()
