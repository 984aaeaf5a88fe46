"""A search over the ranks of all layers together, by what the model puts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressops.compress.outputs import Columns, Outputs, output_error, output_of
from compressops.compress.ranks import Options, Point, allocate
from compressops.formats.decompose import Spectrum, decompose
from compressops.formats.lowrank import LowRank
from compressops.measure import evaluating

# Weights of a layer's error from 1/64 to 64, as powers of 2.
_LARGEST = 6.0


@torch.no_grad()
def search_ranks(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    options: Mapping[str, Options],
    seen: Mapping[tuple[str, str], Outputs | Columns],
    spectra: Mapping[tuple[str, str], Spectrum],
    batch: Any,
    cost: str,
    part: float,
    trials: int,
) -> dict[str, Point]:
    """A choice within the budget whose error of the model's output is the least of all tried.

    A trial weighs the layers' errors and lets `allocate` share the budget out by that, so that
    every trial keeps to the budget, and an order of layers is all that has to be found. The first
    trial changes no weight: nothing worse than without a search comes of it. Optuna's
    tree-structured Parzen estimator (Watanabe 2023, arXiv 2304.11127) makes the others, from a
    fixed seed.

    Args:
        layers, options: by name.
        seen, spectra: by name and form.
        batch: the model's arguments, that the output is measured on.
        cost, part: see `allocate`.
        trials: how many.

    Raises:
        ImportError: optuna is not installed.
        ValueError: see `allocate`.
    """
    optuna = _optuna()
    made: dict[tuple[str, LowRank], list[tuple[Tensor, Tensor]]] = {}

    def changes(name: str, layout: LowRank) -> list[tuple[Tensor, Tensor]]:
        """The layer's tensors, and what they would be."""
        if (name, layout) not in made:
            module, own = layers[name], layers[name].weight.detach()
            spectrum = spectra.get((name, layout.form))
            weight = layout.compose(decompose(layout, own, spectrum), tuple(own.shape))
            made[name, layout] = [(module.weight, weight)]
            if spectrum is not None and module.bias is not None:
                bias = seen[name, layout.form].bias(module.bias, spectrum, layout.rank)
                made[name, layout].append((module.bias, bias))
        return made[name, layout]

    def chosen(weights: Mapping[str, float]) -> dict[str, Point]:
        weighed = {
            name: dataclasses.replace(found, sensitivity=found.sensitivity * 2.0 ** weights[name])
            for name, found in options.items()
        }
        return allocate(weighed, cost, part)

    with evaluating(model):
        reference = output_of(model, batch)

        def error(trial: Any) -> float:
            names = [trial.suggest_float(name, -_LARGEST, _LARGEST) for name in options]
            points = chosen(dict(zip(options, names, strict=True)))
            layouts = [(n, p.layout) for n, p in points.items() if p.layout is not None]
            new = [change for name, layout in layouts for change in changes(name, layout)]
            return output_error(model, new, batch, reference)

        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
            study.enqueue_trial(dict.fromkeys(options, 0.0))
            study.optimize(error, n_trials=trials)
        finally:
            optuna.logging.set_verbosity(verbosity)
    return chosen(study.best_params)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "Factorize(search=…) needs the package optuna: pip install 'compressops[lowrank]'"
        ) from error
    return optuna
