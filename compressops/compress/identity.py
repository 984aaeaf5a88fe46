"""What tells one model or data set from another: hashes that name the checkpoints of a run."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from compressops.train.rng import seeded

# Items of a data set that are hashed where there is no cheaper way to know its contents.
SAMPLED_ITEMS = 32
# What every module has; its other attributes are its own. The mode belongs to the caller.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class _UnknownItemsError(Exception):
    """An item that is not a function of its index, or holds something without a stable value."""


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def model_key(model: nn.Module | None) -> str:
    """A hash of a model's types, names, values, ties and plain attributes."""
    digest = hashlib.sha256(repr(model).encode())
    if model is None:
        return digest.hexdigest()
    for name, value in model.state_dict().items():
        _feed(digest, name)
        if isinstance(value, torch.Tensor):
            _feed(digest, value)
        else:
            digest.update(repr(value).encode())
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            _feed(digest, f"{name}.{key}")
            _feed(digest, module._buffers.get(key))
        # forward may read any of them, and repr shows few.
        for key, value in sorted(vars(module).items()):
            if key not in _OF_EVERY_MODULE and _is_plain(value):
                _feed(digest, f"{name}.{key}={value!r}")
        for key, value in module._parameters.items():
            if value is not None:
                tied = first.setdefault(id(value), f"{name}.{key}")
                if tied != f"{name}.{key}":
                    _feed(digest, f"{name}.{key} is {tied}")
    return digest.hexdigest()


def data_key(dataset: Any) -> tuple[str | None, str]:
    """``(key, note)``: what tells a data set from others, and what the key leaves out.

    A data set's own ``fingerprint`` (any value whose ``str`` names its contents) goes first. A
    `TensorDataset` is hashed whole, `Subset` and `ConcatDataset` by what they are made of. Of
    other data sets up to 32 items are read, spread over the length, at epoch 0 (on a shallow
    copy, so that ``set_epoch`` does not reach the caller's) and with seeded random generators.
    Where an item is not the same twice even so, type and length are all there is, and the note
    says so.
    """
    if dataset is None:
        return None, ""
    kind, length = type(dataset).__qualname__, len(dataset)
    if own := getattr(dataset, "fingerprint", None):
        return str(own), ""
    digest = hashlib.sha256(f"{kind}[{length}]".encode())
    notes = ""
    try:
        if type(dataset) is TensorDataset:
            _feed(digest, dataset.tensors)
        elif type(dataset) is Subset:
            _feed(digest, [int(i) for i in dataset.indices])
            key, notes = data_key(dataset.dataset)
            _feed(digest, key)
        elif type(dataset) is ConcatDataset:
            for part in dataset.datasets:
                key, note = data_key(part)
                _feed(digest, key)
                notes = notes or note
        else:
            _feed_items(digest, copy.copy(dataset), length)
    except _UnknownItemsError as error:
        return f"{kind}[{length}]", (
            f"{kind} is known by its type and length alone ({error}): a run on other data of the "
            f"same length would go on from this one's checkpoints; give it a fingerprint attribute"
        )
    return f"{kind}[{length}] {digest.hexdigest()[:16]}", notes


def _feed_items(digest: Any, dataset: Any, length: int) -> None:
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0, 0)
    count = min(length, SAMPLED_ITEMS)
    for i in range(count):
        index = i * (length - 1) // max(1, count - 1)
        found = []
        for _ in range(2):
            part = hashlib.sha256()
            with seeded(index):
                item = (
                    dataset[index]
                    if hasattr(dataset, "__getitem__")
                    else dataset.__getitems__([index])
                )
                _feed(part, item)
            found.append(part.digest())
        if found[0] != found[1]:
            raise _UnknownItemsError(f"item {index} differs when it is read twice")
        digest.update(found[0])


def _feed(digest: Any, value: Any) -> None:
    """Add ``value`` with its type, so that no two values feed the same bytes."""
    digest.update(f"<{type(value).__name__}".encode())
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        text = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(f"{len(text)}:".encode() + text)
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, dict):
        digest.update(f"{len(value)}".encode())
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif hasattr(value, "tobytes") and hasattr(value, "size") and hasattr(value, "mode"):
        # An image of PIL, which need not be installed.
        digest.update(f"{value.mode}{value.size}".encode())
        digest.update(value.tobytes())
    else:
        raise _UnknownItemsError(f"its items hold a {type(value).__qualname__}")
    digest.update(b">")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
