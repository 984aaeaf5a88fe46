"""Times of layers on real inputs, for `convert` and the command line."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Tensors made within the ``with`` block are normal ones, in inference mode too: those of that
    mode do not count what is written to them, so that layers could keep nothing of their weights.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def as_normal(inputs: Any) -> Any:
    """``inputs`` with copies in place of what was made in inference mode."""
    if isinstance(inputs, Tensor):
        return inputs.clone() if inputs.is_inference() else inputs
    if isinstance(inputs, Mapping):
        return {key: as_normal(value) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(as_normal(value) for value in inputs)
    return inputs


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

    def keep(name: str, args: tuple[Any, ...]) -> None:
        # A copy: the model may go on to write into its activations in place.
        captured[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)

    observe(model, layers, inputs, keep)
    return captured


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    see: Callable[[str, tuple[Any, ...]], None],
    every: bool = False,
) -> None:
    """Run ``model`` once, in eval mode; before a layer's first call, or before ``every`` one, call
    ``see(name, args)``.

    Layers that are not called, or are called with keyword arguments, are left out. The model's
    mode is restored.
    """
    seen: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and (every or name not in seen):
                seen.add(name)
                see(name, args)

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def times_in_place(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    variants: Mapping[str, Sequence[Callable[..., Any]]],
    inputs: Any,
    rounds: int = 15,
    seconds: float = 20.0,
) -> dict[str, list[list[float]]]:
    """Seconds of each variant of each layer where the layer stands: while ``model`` runs.

    What a variant costs depends on what the layers before and after it leave in the caches, so the
    whole model runs, in eval mode, with the first variant of all layers, then the second, in turns.

    Args:
        model: the model; it is as before afterwards.
        layers: its layers that are measured, by name.
        variants: for each layer the functions, as many for all, that take its arguments.
        inputs: of the model.
        rounds: turns that count; one more goes before.
        seconds: about how long all may take: then fewer rounds are run, but no fewer than five.

    Returns:
        For each layer and variant the seconds of each round: the sum over the layer's calls.
    """
    count = max((len(functions) for functions in variants.values()), default=0)
    times = {name: [[] for _ in functions] for name, functions in variants.items()}
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else (lambda: None)
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait()
            began = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return run

    before = {name: vars(layers[name]).get("forward") for name in variants}
    try:
        with evaluating(model):
            began, round_ = time.perf_counter(), -1
            while round_ < rounds:
                for index in range(count):
                    spent.clear()
                    for name, functions in variants.items():
                        layers[name].forward = timed(name, functions[index])
                    call(model, inputs)
                    if round_ >= 0:
                        for name, elapsed in spent.items():
                            times[name][index].append(elapsed)
                round_ += 1
                took = (time.perf_counter() - began) / (round_ + 1)
                rounds = max(5, min(rounds, int(seconds / took)))
    finally:
        for name, forward in before.items():
            if forward is None:
                vars(layers[name]).pop("forward", None)
            else:
                layers[name].forward = forward
    return times


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; each module's own mode comes back."""
    with eval_mode(model), torch.no_grad():
        yield
