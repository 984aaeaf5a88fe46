"""What the benchmarks of linear layers share: layers, options, and the loop over shapes."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import context, interleaved, merged, report
from linear_peers import Case
from peers import MissingError, Peer, vnni_peak
from rich.console import Console

# Threads that spin after their work stop doing so in less.
SETTLE = 0.005


@dataclass(frozen=True)
class Layer:
    """``N`` outputs of ``K`` inputs, of a group of layers that is named."""

    group: str
    K: int
    N: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.group} {self.K}→{self.N}"

    def case(self, M: int, threads: int) -> Case:
        """One with random values, of a trained layer's size."""
        weight = torch.randn(self.N, self.K) / self.K**0.5
        return Case(torch.randn(M, self.K), weight, threads)


LAYERS = [
    *(Layer("minilm", K, N) for K, N in ((384, 384), (384, 1536), (1536, 384))),
    *(Layer("bert", K, N) for K, N in ((768, 768), (768, 3072), (3072, 768))),
    *(Layer(str(size), size, size) for size in (4096, 8192, 16384)),
]
SMOKE = [Layer("smoke", 128, 64)]


def options(out: argparse.ArgumentParser, layers: list[Layer]) -> argparse.ArgumentParser:
    """The options of these benchmarks."""
    groups = list(dict.fromkeys(layer.group for layer in layers))
    out.add_argument("--layers", nargs="+", default=groups, choices=groups)
    out.add_argument("--m", type=int, nargs="+", default=[1, 8, 64, 512, 4096], help="rows of x")
    out.add_argument("--max-seconds", type=float, default=120, help="skip a slower shape")
    out.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    return out


def contestants(
    makers: dict[str, Callable[[Case], Peer]], case: Case, tolerance: float
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that can take part and compute this product, and why the others do not."""
    found, missing = {}, {}
    expected = case.x[:8].double() @ case.weight.double().t()
    for name, make in makers.items():
        try:
            peer = make(case)
            peer.run()
            error = (peer.result()[:8].double() - expected).pow(2).mean().sqrt()
            relative = (error / expected.pow(2).mean().sqrt()).item()
            if not relative < tolerance:
                raise MissingError(f"its result is off by {relative:.1e} of the root mean square")
            found[name] = peer
        except MissingError as why:
            missing[name] = str(why)
    return found, missing


@torch.no_grad()
def run(
    title: str,
    makers: dict[str, Callable[[Case], Peer]],
    row: Callable[[Layer, Case, dict[str, list[float]]], dict],
    tolerance: float,
    arguments: argparse.Namespace,
    cold: Callable[[Layer, int, int, bool], dict] | None = None,
) -> None:
    """Time every shape, print the table and write it.

    Args:
        row: the columns of a shape's row from the seconds of each contestant.
        tolerance: error of a result that is still right, of its root mean square.
        cold: the row of a layer whose weights are not in the caches.
    """
    torch.manual_seed(0)
    smoke = arguments.smoke
    if smoke:
        # What runs everywhere; other libraries have no place in a test.
        makers = {n: m for n, m in makers.items() if not n.startswith(("onnx", "OpenVINO"))}
    rounds = 2 if smoke else max(15, arguments.rounds)
    layers = SMOKE if smoke else [la for la in LAYERS if la.group in arguments.layers]
    rows, skipped = [], []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for layer in layers:
            for M in [2] if smoke else arguments.m:
                # Quarter of the peak, for half of the contestants; float32 takes longer.
                seconds = 2 * M * layer.K * layer.N / 1e11 / threads * len(makers) * rounds
                if seconds > arguments.max_seconds:
                    skipped.append(f"{layer.name}, M={M}, {threads} threads: {seconds:.0f} s")
                    continue
                case = layer.case(M, threads)
                entered, missing = contestants(makers, case, tolerance)
                calls = {name: peer.run for name, peer in entered.items()}
                times = interleaved(calls, rounds, settle=0.0 if smoke else SETTLE)
                found = {
                    **{"layer": layer.name, "M": M, "K": layer.K, "N": layer.N},
                    "threads": threads,
                    **row(layer, case, times),
                }
                if not smoke:
                    found["VNNI peak GOP/s"] = vnni_peak(threads)
                    found["µs"] = {n: statistics.median(t) * 1e6 for n, t in times.items()}
                    found["least µs"] = {n: min(t) * 1e6 for n, t in times.items()}
                    found["missing"] = missing
                    Console(width=200).print(found)
                rows.append(found)
            if cold is not None and (smoke or layer.group == "4096"):
                rows.append(cold(layer, threads, rounds, smoke))
    rows = merged(rows, arguments, ("layer", "M", "threads"))
    shown: dict[str, None] = {}
    for found in rows:
        shown |= dict.fromkeys(k for k, v in found.items() if not isinstance(v, dict))
    quiet = argparse.Namespace(**{**vars(arguments), "smoke": True})
    report(title, [{key: found.get(key, "–") for key in shown} for found in rows], quiet)
    for line in skipped:
        print("skipped:", line)
    if not smoke:
        result = {**context(arguments), "title": title, "skipped": skipped, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {arguments.out}")
