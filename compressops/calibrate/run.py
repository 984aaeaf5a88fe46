"""Fit the integers of a model's layers: to their weights, and to what they see of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from compressops.calibrate.config import Calibrate
from compressops.calibrate.gptq import Hessian, gptq
from compressops.calibrate.ranges import Range
from compressops.calibrate.weights import fit_mse
from compressops.formats import Int
from compressops.measure import observe

# Hessians that are held at once; beyond that the model runs on the data again.
HESSIAN_BYTES = 2**30
_UNSEEN = "the calibration data never reach it"


@dataclass(frozen=True)
class Layer:
    """What is to be fitted of a layer.

    Attributes:
        module: the float layer, in the model.
        number: the integers of its weight, or ``None``: the weight stays as it is.
        mask: bool, the entries of the weight that are not to become 0; ``None``: all.
        linear: the output is ``input @ weight.T``.
        static: the activations may be given one range.
        weight: layers that share a weight have the same number here.
    """

    module: nn.Module
    number: Int | None
    mask: Tensor | None
    linear: bool
    static: bool
    weight: int


@dataclass(frozen=True)
class Fitted:
    """What was found for a layer.

    Attributes:
        params: of the number; ``None``: those that it fits itself.
        weight: float32, on the grid of these; ``None``: the layer's own, rounded to nearest.
        activations: scale and zero point (``None``: symmetric) of the inputs; ``None``: dynamic.
        why: what was done with the weight, for the report; ``""``: nothing.
        activations_why: the same of the activations.
    """

    params: dict[str, Tensor] | None = None
    weight: Tensor | None = None
    activations: tuple[float, int | None] | None = None
    why: str = ""
    activations_why: str = ""


def calibrate(
    model: nn.Module, layers: Mapping[str, Layer], config: Calibrate, example_inputs: Any = None
) -> dict[str, Fitted]:
    """Fit all of ``layers`` (by name). The model is as before afterwards.

    Layers see the activations of the float model: the error of one is not known to the next.

    Raises:
        ValueError: there are no data where some are needed, or they hold NaN or infinities; the
            message names the layer.
    """
    static = {name: layer for name, layer in layers.items() if config.static and layer.static}
    sharing = _compensated(layers) if config.weights == "gptq" else {}
    batches = config.batches(example_inputs) if static or sharing else []
    ranges = _ranges(model, static, config, batches)
    weights = _compensate_all(model, layers, sharing, config, batches)
    fitted = {}
    for name, layer in layers.items():
        found = weights.get(name) or _fit(layer, config)
        if name in ranges:
            activations, why = _activations(ranges[name], config)
            found = replace(found, activations=activations, activations_why=why)
        fitted[name] = found
    return fitted


def _compensated(layers: Mapping[str, Layer]) -> dict[int, list[str]]:
    """The layers for `gptq`, by weight: only where all that share it are linear."""
    sharing: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.number is not None:
            sharing.setdefault(layer.weight, []).append(name)
    return {key: names for key, names in sharing.items() if all(layers[n].linear for n in names)}


def _ranges(
    model: nn.Module, static: Mapping[str, Layer], config: Calibrate, batches: list[Any]
) -> dict[str, Range]:
    ranges = {name: Range(config.activations != "minmax") for name in static}
    modules = {name: layer.module for name, layer in static.items()}
    for batch in batches if static else ():
        observe(
            model, modules, batch, lambda name, args: _see(name, ranges[name], args), every=True
        )
    return ranges


def _see(name: str, observer: Range | Hessian, args: tuple[Any, ...]) -> None:
    try:
        observer.add(args[0])
    except ValueError as error:
        raise ValueError(f"layer {name!r}: calibration: {error}") from error


def _activations(range_: Range, config: Calibrate) -> tuple[tuple[float, int | None] | None, str]:
    if not range_.count:
        return None, f"{_UNSEEN}: activations stay dynamic"
    scale, zero = range_.quantization(config)
    point = "" if zero is None else f", zero point {zero}"
    return (scale, zero), f"activations static by {config.activations}, scale {scale:.3g}{point}"


def _compensate_all(
    model: nn.Module,
    layers: Mapping[str, Layer],
    sharing: Mapping[int, list[str]],
    config: Calibrate,
    batches: list[Any],
) -> dict[str, Fitted]:
    found: dict[str, Fitted] = {}
    for part in _parts(layers, sharing):
        hessians = {key: Hessian() for key in part}
        keys = {name: key for key, names in part.items() for name in names}
        modules = {name: layers[name].module for name in keys}

        def see(name: str, args: tuple[Any, ...], held=hessians, keys=keys) -> None:
            _see(name, held[keys[name]], args)

        for batch in batches:
            observe(model, modules, batch, see, every=True)
        for key, names in part.items():
            fitted = _compensate(names[0], layers[names[0]], hessians.pop(key), config)
            found.update(dict.fromkeys(names, fitted))
    return found


def _parts(
    layers: Mapping[str, Layer], sharing: Mapping[int, list[str]]
) -> Iterator[dict[int, list[str]]]:
    """``sharing`` in parts whose Hessians fit into memory together."""
    part: dict[int, list[str]] = {}
    held = 0
    for key, names in sharing.items():
        nbytes = 4 * layers[names[0]].module.weight.shape[1] ** 2
        if part and held + nbytes > HESSIAN_BYTES:
            yield part
            part, held = {}, 0
        part[key] = names
        held += nbytes
    if part:
        yield part


def _compensate(name: str, layer: Layer, hessian: Hessian, config: Calibrate) -> Fitted:
    if hessian.matrix is None:
        found = _fit(layer, config)
        return replace(found, why=f"{found.why}, not by gptq: {_UNSEEN}")
    number, weight = layer.number, layer.module.weight.detach().float()
    try:
        rounded, params = gptq(
            weight,
            hessian.matrix,
            number,
            damping=config.damping,
            activation_order=config.activation_order,
            block_size=config.block_size,
            mask=layer.mask,
        )
    except ValueError as error:
        raise ValueError(f"layer {name!r}: calibration: {error}") from error
    nearest = number.fake_quantize(weight, number.fit(weight))
    errors = [hessian.error(weight - other) for other in (rounded, nearest)]
    # Relative to the output, both as root mean squares.
    scale = hessian.error(weight) or 1.0
    ours, theirs = (math.sqrt(max(0.0, error) / scale) for error in errors)
    figures = f"output error {ours:.2g} on {hessian.rows} inputs, {theirs:.2g} rounded to nearest"
    if not ours < theirs:
        found = _fit(layer, config)
        return replace(found, why=f"{found.why}, not by gptq: {figures}")
    return Fitted(params, rounded, why=f"weights by gptq: {figures}")


def _fit(layer: Layer, config: Calibrate) -> Fitted:
    if layer.number is None:
        return Fitted()
    if config.weights == "minmax":
        return Fitted(why="weights by minmax")
    return Fitted(fit_mse(layer.number, layer.module.weight), why="weights by mse")
