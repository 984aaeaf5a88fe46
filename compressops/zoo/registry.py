"""The allow-list of models and data sets that a recipe file may name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from compressops.zoo import cifar10, sentiment
from compressops.zoo.cifarnet import CifarNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "CifarNet": CifarNet,
    "MiniLMClassifier": sentiment.minilm_classifier,
}
DATA: dict[str, Callable[..., tuple[Any, Any]]] = {
    "Cifar10": cifar10.datasets,
    "Sentiment": sentiment.datasets,
}
_PATHS = ("checkpoint", "root")


def build_model(spec: dict[str, dict], folder: Path | None = None) -> nn.Module:
    """The model that ``{"CifarNet": {"checkpoint": …, **arguments}}`` names.

    Args:
        spec: name and arguments; ``checkpoint`` is a safetensors file of its ``state_dict``.
        folder: what a relative ``checkpoint`` is relative to; ``None`` is the current folder.

    Raises:
        ValueError: an unknown name or argument, or a checkpoint that does not fit the model.
        FileNotFoundError: no such checkpoint.
    """
    name, arguments = _resolve("model", spec, MODELS, folder, extra=("checkpoint",))
    checkpoint = arguments.pop("checkpoint", None)
    model = MODELS[name](**arguments)
    if checkpoint is not None:
        if not checkpoint.is_file():
            raise FileNotFoundError(f"model {name}: checkpoint {checkpoint} does not exist")
        try:
            model.load_state_dict(load_file(checkpoint))
        except RuntimeError as error:
            raise ValueError(f"model {name}: {checkpoint} does not fit: {error}") from error
    return model.eval()


def build_data(spec: dict[str, dict], folder: Path | None = None) -> tuple[Any, Any]:
    """``(train_data, eval_data)`` of ``{"Cifar10": {**arguments}}``; see `build_model`."""
    name, arguments = _resolve("data", spec, DATA, folder)
    return DATA[name](**arguments)


def _resolve(
    kind: str,
    spec: Any,
    known: dict[str, Callable],
    folder: Path | None,
    extra: tuple[str, ...] = (),
) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        spec = {spec: {}}
    if not isinstance(spec, dict) or len(spec) != 1:
        raise ValueError(f"{kind} must be one name with its arguments, got {spec!r}")
    ((name, arguments),) = spec.items()
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(sorted(known))}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"{kind} {name}: arguments must be a mapping, got {arguments!r}")
    allowed = [*inspect.signature(known[name]).parameters, *extra]
    for key in arguments:
        if key not in allowed:
            raise ValueError(
                f"{kind} {name}: unknown argument {key!r}; allowed are {', '.join(allowed)}"
            )
    return name, {
        key: (folder or Path()) / value if key in _PATHS and value is not None else value
        for key, value in arguments.items()
    }
