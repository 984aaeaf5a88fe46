"""Times of layers on real inputs, for `convert` and the command line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def median_times(
    functions: Sequence[Callable[[], Any]], rounds: int = 15, warmup: int = 3
) -> list[float]:
    """Median seconds of each function, the functions taking turns so that drift hits all alike.

    CUDA work is waited for.
    """
    times: list[list[float]] = [[] for _ in functions]
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else (lambda: None)
    with torch.no_grad():
        for round_ in range(warmup + rounds):
            for function, seconds in zip(functions, times, strict=True):
                wait()
                began = time.perf_counter()
                function()
                wait()
                if round_ >= warmup:
                    seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in times]


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: ``inputs`` is none of these.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    raise TypeError(
        f"example_inputs must be a tensor, a tuple or a dict, got {type(inputs).__name__}"
    )


def captured_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any
) -> dict[str, tuple[Any, ...]]:
    """What each layer is first called with when ``model`` runs once, in eval mode.

    Layers that are not called, or are called with keyword arguments, are left out. The model's
    mode is restored.
    """
    captured: dict[str, tuple[Any, ...]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and name not in captured:
                # A copy: the model may go on to write into its activations in place.
                captured[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)

        return keep

    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return captured
