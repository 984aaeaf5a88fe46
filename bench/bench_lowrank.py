"""The 13 convolutions of VGG16 with ImageNet's weights, factorized after training, at 224×224.

    python bench/bench_lowrank.py --models MODELS

`compressops/zoo/vgg16.py` says what to install. Ranks share a budget of multiply-accumulates out
over the layers, whose outputs are calibrated on crops of three photographs. Errors are relative,
of the last ReLU's output and (by root mean square) of each layer's for the dense network's inputs,
on crops of eight other photographs. Times: one image, channels last; the dense network as torch
runs it (in NCHW, too), what `convert` makes of it by measuring (Winograd), and what it makes of the
factorized one. × are times faster than either. Nothing is retrained.

``--models`` keeps the factorized and the converted models in a folder, so that a second run only
measures. `convert` measures, too: on a machine that does nothing else.
"""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path

import torch
from common import interleaved, median_ratio, merged, parser, report
from torch import Tensor, nn

import compressops as co
from compressops.compress.parametrizations import Factors, find
from compressops.zoo import vgg16

CALIBRATION = ("chelsea.png", "coffee.png", "motorcycle_left.png")
HELD_OUT = (
    *("astronaut.png", "rocket.jpg", "quokka.jpg", "bus.jpg"),
    *("zidane.jpg", "penguins.png", "macaw.png", "grace_hopper.jpg"),
)


def multiply_accumulates(model: nn.Module, x: Tensor) -> float:
    """Of all convolutions, for one image."""
    total = 0.0

    def count(module: nn.Conv2d, _: object, output: Tensor) -> None:
        nonlocal total
        part, shape = find(module, Factors), tuple(module.weight.shape)
        each = module.weight.numel() if part is None else part.layout.macs(shape, module.stride)
        total += each * output[0, 0].numel()

    handles = [m.register_forward_hook(count) for m in model if isinstance(m, nn.Conv2d)]
    model(x[:1])
    for handle in handles:
        handle.remove()
    return total


def errors(dense: nn.Module, ours: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of the output, and of single layers (root mean square)."""
    found, inner = [], x
    for module, other in zip(dense, ours, strict=True):
        after = module(inner.clone())
        if isinstance(module, nn.Conv2d):
            found.append(((other(inner) - after).norm() / after.norm()).item())
        inner = after
    whole = ((ours(x) - inner).norm() / inner.norm()).item()
    return whole, statistics.mean(error**2 for error in found) ** 0.5


def converted(name: str, model: nn.Module, plain: nn.Module, x: Tensor, folder: Path | None):
    """What `convert` makes of it, kept in the folder."""
    path = None if folder is None else folder / f"{name}.safetensors"
    if path is not None and path.exists():
        return co.load(path, plain)
    result = co.convert(model, example_inputs=x)
    if path is not None:
        co.save(result, path)
    return result


def how(model: nn.Module) -> str:
    """How many convolutions run as what."""
    names = [
        type(m).__name__.removesuffix("Conv2d") + ("" if m.winograd is None else " Winograd")
        for m in model
        if hasattr(m, "winograd")
    ]
    plain = sum(type(m) is nn.Conv2d for m in model)
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(f"{n} {name}" for name, n in ({"direct": plain} | counts).items() if n)


def factorized(
    dense: nn.Sequential, form: str, macs: float, crops: tuple[Tensor, ...], folder: Path | None
) -> tuple[nn.Sequential, co.Factorize]:
    """The network in calibrated factors and the stage that has its ranks, kept in the folder."""
    path = None if folder is None else folder / f"{form}-{macs}-{len(crops)}.pt"
    model = copy.deepcopy(dense)
    if path is not None and path.exists():
        kept = torch.load(path)
        stage = co.Factorize(ranks=kept["ranks"])
        stage.attach(model)
        model.load_state_dict(kept["state"])
        return model, stage
    stage = co.Factorize(form, macs=macs, calibration=len(crops)).apply(model, crops)
    stage = co.Factorize(ranks=stage.ranks)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"ranks": stage.ranks, "state": model.state_dict()}, path)
    return model, stage


@torch.no_grad()
def main() -> None:
    out = parser(__doc__, "lowrank-cpu")
    out.add_argument("--forms", nargs="+", default=["matrix", "spatial"])
    out.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.45, 0.4])
    out.add_argument("--models", type=Path)
    out.add_argument("--merge", action="store_true", help="keep the rows that the file has")
    arguments = out.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.smoke:
        model, size, budgets = vgg16.vgg16(0.125).eval(), 32, [0.5]
        train, held = torch.randn(4, 3, size, size), torch.randn(2, 3, size, size)
    else:
        model, budgets = vgg16.load(), arguments.macs
        train, held = vgg16.crops(CALIBRATION, 24, seed=1), vgg16.crops(HELD_OUT, 16, seed=2)
    # A quarter of what `convert` leaves would be the pools' in NCHW.
    plain, model = model, copy.deepcopy(model).to(memory_format=torch.channels_last)
    rounds = 2 if arguments.smoke else arguments.rounds
    folder = arguments.models
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    x, whole = held[:1].to(memory_format=torch.channels_last), multiply_accumulates(model, held)
    fast, first = converted("dense", model, model, x, folder), held[:1]
    contestants = {
        "dense NCHW": lambda: plain(first),
        "dense": lambda: model(x),
        "dense converted": lambda: fast(x),
    }
    rows, ran = [], {}
    for form in arguments.forms:
        for macs in budgets:
            name = f"{form}-{macs}"
            notes = None if folder is None else folder / f"{name}.json"
            cut, _ = factorized(model, form, macs, train.split(4), folder)
            if notes is not None and notes.exists():
                row = json.loads(notes.read_text())
            else:
                output, layer = errors(model, cut, held)
                row = {
                    **{"form": form, "budget": macs},
                    "× fewer MACs": whole / multiply_accumulates(cut, held),
                    "output error": output,
                    "layer error": layer,
                }
                if notes is not None:
                    notes.write_text(json.dumps(row))
            ran[name] = converted(name, cut, model, x, folder)
            contestants[name] = lambda m=ran[name]: m(x)
            rows.append((name, row))
    table = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds = interleaved(contestants, rounds)
        times = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
        table += [
            {
                "threads": threads,
                **row,
                "dense NCHW ms": times["dense NCHW"],
                "dense ms": times["dense"],
                "dense converted ms": times["dense converted"],
                "ms": times[name],
                "× torch": median_ratio(seconds["dense"], seconds[name]),
                "× converted": median_ratio(seconds["dense converted"], seconds[name]),
                "runs as": how(ran[name]),
            }
            for name, row in rows
        ]
    table = merged(table, arguments, ("threads", "form", "budget"))
    report("VGG16 factorized, × = times faster than the dense network", table, arguments)


if __name__ == "__main__":
    main()
