"""Taps: what the layers of a model put out, read by hooks that change nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

# By name: FSDP's module is not imported where it is not used.
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile`, DataParallel, DDP and FSDP."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        elif type(model).__name__ in _WRAPPERS:
            model = model.module
        else:
            return model


def find_layers(argument: str, globs: str | Iterable[str], model: nn.Module) -> list[str]:
    """The modules of ``model`` whose path matches a glob: in the order of the globs, and those of
    one in the model's order.

    Raises:
        ValueError: a glob matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for glob in (globs,) if isinstance(globs, str) else globs:
        hits = [name for name in names if fnmatchcase(name, glob)]
        if not hits:
            raise ValueError(
                f"{argument}: {glob!r} matches no layer; the model's are {', '.join(names)}"
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def paired(
    owner: str,
    layers: str | Sequence[str],
    teacher_layers: str | Sequence[str] | None,
    student: nn.Module,
    teacher: nn.Module,
) -> list[tuple[str, str]]:
    """Layers of the student and of the teacher, one to one in their order.

    Raises:
        ValueError: a glob matches no layer, or there are more of one than of the other.
    """
    mine = find_layers(f"{owner}: layers", layers, student)
    if teacher_layers is None:
        teacher_layers = layers
    its = find_layers(f"{owner}: teacher_layers", teacher_layers, teacher)
    if len(mine) != len(its):
        raise ValueError(
            f"{owner}: {len(mine)} layers of the student ({', '.join(mine)}) cannot pair with "
            f"{len(its)} of the teacher ({', '.join(its)}); name them in layers and teacher_layers"
        )
    return list(zip(mine, its, strict=True))


class Taps:
    """Within its ``with`` block, keeps the outputs that named layers gave in the model's last call.

    Hooks do it, which are gone after the block; without names there are none. The model computes
    what it does without them. They work on the model inside of `torch.compile`, DDP and FSDP
    (a compiled model is compiled once more, when the block begins and after it), and where
    activations are checkpointed, without reentrance. What runs in the backward pass, as that does,
    is not looked at.

    Args:
        model: any module.
        names: paths of layers in it. Of an output that is no tensor, its first is taken.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = unwrapped(model)
        self.names = list(dict.fromkeys(names))
        self._outputs: dict[str, list[tuple[Tensor, int, bool]]] = {}
        self._open = False
        self._handles: list[Any] = []
        self._compiled = model is not self.model or any(
            m._compiled_call_impl is not None for m in self.model.modules()
        )

    def __enter__(self) -> Taps:
        if self._handles:
            raise RuntimeError("these taps are in place already")
        if self.names:
            self._handles.append(self.model.register_forward_pre_hook(self._begin))
        for name in self.names:
            module = self.model.get_submodule(name)
            self._handles.append(
                module.register_forward_hook(functools.partial(self._record, name))
            )
        self._recompile()
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
        self._recompile()

    def take(self, names: Sequence[str]) -> list[Tensor]:
        """The outputs of ``names`` in the last call of the model.

        Raises:
            ValueError: a layer did not run, or more than once, or its output has been overwritten
                since, or was computed where no gradients are.
        """
        return [self._one(name) for name in names]

    def clear(self) -> None:
        """Forget the outputs, and look at none until the model is called again."""
        self._outputs, self._open = {}, False

    def _recompile(self) -> None:
        # Dynamo does not guard on hooks, so a graph from before would go on without them.
        if self.names and self._compiled:
            torch.compiler.reset()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._outputs = {}
        self._open = True
        self._grad = torch.is_grad_enabled()

    def _record(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open:
            return
        value = first_tensor(output)
        version, lost = 0, self._grad and not torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            # The compiler leaves nothing to tell an overwritten tensor by, and fuses the copy.
            value = value.clone()
        else:
            version = value._version
        self._outputs.setdefault(name, []).append((value, version, lost))

    def _one(self, name: str) -> Tensor:
        found = self._outputs.get(name, [])
        if len(found) != 1:
            raise ValueError(
                f"layer {name!r} ran {len(found)} times in the last call of the model, and a tap "
                "needs exactly one: call the model first, and tap no layer that it shares or skips"
            )
        value, version, lost = found[0]
        if not torch.compiler.is_compiling() and value._version != version:
            raise ValueError(
                f"the output of layer {name!r} is overwritten in place by a layer after it; tap "
                "that one, or set its inplace=False"
            )
        if lost:
            raise ValueError(
                f"layer {name!r} ran without gradients: activation checkpointing needs "
                "use_reentrant=False"
            )
        return value


def first_tensor(output: Any) -> Tensor:
    """``output`` itself, or the first tensor in a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    for value in values if isinstance(values, Iterable) else ():
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"a tapped layer gave no tensor, but {type(output).__name__}")


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: itself, its ``logits``, or its first element."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]
