"""Activations that the layer before them computes, while its results are in the cache.

That a module calls both in turn, and uses what is between them for nothing else, is not read from
its source, but seen: its ``forward`` runs on stand-ins of its children. That nobody else calls the
layer need not be seen: it computes the activation only while that ``forward`` runs (`Caller`).
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressops.model_state import join
from compressops.nn import Fused, PackedModule
from compressops.nn.fused import Activating, Caller

if TYPE_CHECKING:
    from compressops.conversion import Conversion

# The layers: what their inputs and outputs are called, and where those are in a tensor.
_FEATURES = {
    nn.Linear: ("in_features", "out_features", -1),
    nn.Conv2d: ("in_channels", "out_channels", -3),
}
_BEFORE = ("_forward_pre_hooks",)
_AFTER = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a module has that its forward may write to, beside attributes of its class's own.
_SHARED = vars(nn.Module()).keys() - {"_parameters", "_buffers"}
# Operations and calls of children in one forward; far more than a module with two layers makes.
_MOST = 1000


def activation_of(module: nn.Module) -> str | None:
    """The fusable activation that a module computes and nothing else; ``None``: none."""
    if "forward" in vars(module):
        return None
    kind = type(module)
    if kind is Fused:
        return module.activation
    if kind is nn.ReLU:
        return "relu"
    # transformers has a module of its own for torch's function.
    named = kind.__name__ == "GELUActivation" and getattr(module, "act", None) is F.gelu
    exact = kind is nn.GELU and module.approximate == "none"
    return "gelu" if exact or named else None


def pairs(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Of each linear layer or 2-D convolution whose output an activation module takes, and nothing
    else does: its name, the activation module's, and the activation's.

    Not found are layers or activations that have several places in the model, that a hook watches,
    and those of a module whose ``forward`` takes more than one tensor, calls them otherwise in
    training than in evaluation or on inputs of some shapes, or does not end. What a ``forward``
    writes to its module's attributes it writes to copies.
    """
    # Copies of attributes are to copy no module that they name.
    known = {id(module): module for module in model.modules()}
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found = {}
    for name, parent in model.named_modules():
        # Of one module alone: with several, it would depend on which of them calls.
        alone = {k: m for k, m in parent._modules.items() if places[id(m)] == 1}
        layers = {k for k, m in alone.items() if _source(m) and not _watched(m, *_AFTER)}
        activations = {
            key: activation
            for key, module in alone.items()
            if (activation := activation_of(module)) and not _watched(module, *_BEFORE, *_AFTER)
        }
        if not layers or not activations:
            continue
        for layer, after in _in_turn(parent, known):
            if layer in layers and after in activations:
                found[join(name, layer)] = join(name, after), activations[after]
    return found


def fuse(job: Conversion) -> dict[str, str]:
    """Let the layers of a conversion that can compute the activations that follow them, do so.

    Returns:
        For `link`, of each layer the name of its activation.
    """
    fused: dict[str, str] = {}
    candidates = {name for name, new in job.built.items() if isinstance(new, Activating)}
    if not candidates:
        return fused
    for name, (after, activation) in pairs(job.model).items():
        module = job.model.get_submodule(after)
        if name not in candidates or isinstance(module, Fused):
            continue
        job.built[name].activation = activation
        job.modules[after], job.built[after] = module, Fused(activation)
        why = f"computes the {activation} of {after!r} too"
        job.note(name, job.modules[name], [*job.whys[name], why])
        fused[name] = after
    return fused


def link(model: nn.Module, fused: dict[str, str]) -> None:
    """Let layers compute their activations only while the modules run that call both."""
    for name, after in fused.items():
        layer, activation = model.get_submodule(name), model.get_submodule(after)
        if layer.caller is None or layer.caller is not activation.caller:
            layer.caller = activation.caller = Caller()
            layer.caller.attach(model.get_submodule(name.rpartition(".")[0]))


def settle_loaded(job: Conversion) -> dict[str, str]:
    """See that the layers of a file and the activations that they compute belong together.

    An activation that was fused in the model, and is not in the file, is computed again.

    Returns:
        As `fuse`.

    Raises:
        ValueError: a layer computes an activation that does not follow it in the model, or one
            would be computed by none.
    """
    stood = {n: m for n, m in job.model.named_modules() if isinstance(m, Fused)}
    for name, module in stood.items():
        if name not in job.built:
            job.modules[name], job.built[name] = module, module.plain()
    missing = {n: new.activation for n, new in job.built.items() if isinstance(new, Fused)}
    layers = {n: a for n, new in job.built.items() if (a := getattr(new, "activation", None))}
    layers = {name: activation for name, activation in layers.items() if name not in missing}
    known = pairs(job.model) if layers or missing else {}
    fused = {}
    for name, activation in layers.items():
        after, there = known.get(name, (None, None))
        if there != activation or missing.pop(after, None) != activation:
            raise ValueError(
                f"layer {name!r}: the file has it compute a {activation}, and in the model "
                + (f"{after!r}, a {there}, follows it" if after else "no activation follows it")
            )
        fused[name] = after
    for name, activation in missing.items():
        raise ValueError(f"layer {name!r}: the file has no layer that computes its {activation}")
    return fused


def _source(module: nn.Module) -> type[nn.Module] | None:
    """The float layer that it is or stands for, where its output may be fused with what follows."""
    kind = parametrize.type_before_parametrizations(module)
    source = kind.source if issubclass(kind, PackedModule) else kind
    fits = source in _FEATURES and "forward" not in vars(module)
    return source if fits else None


def _watched(module: nn.Module, *hooks: str) -> bool:
    return any(getattr(module, name) for name in hooks)


class _StandIn(nn.Module):
    """Takes the place of a child: remembers its calls, and computes nothing."""

    def __init__(self, child: nn.Module, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch
        source = _source(child)
        _, outputs, self.at = _FEATURES.get(source, (None, None, None))
        self.outputs = None if source is None else getattr(child, outputs)
        self.calls: list[tuple[Tensor, ...]] = []
        self.results: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors = tuple(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        with self.watch.away():
            first = tensors[0]
            size = list(first.shape)
            if self.outputs is not None:
                # Of a convolution as many pixels as it takes: nobody reads them.
                size[self.at] = self.outputs
            result = first.new_zeros(size)
        self.calls.append(tensors)
        self.results.append(result)
        return result


class _Endless(BaseException):
    """A forward that may never end; no ``Exception``, which it might catch to go on."""


class _Watch(TorchDispatchMode):
    """Keeps the memory that the operations of a module read or write by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[Tensor] = []
        self._active = True
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._active:
            self.count()
            self.used += [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        return func(*args, **(kwargs or {}))

    def count(self) -> None:
        """One more operation or call."""
        self._count += 1
        if self._count > _MOST:
            raise _Endless

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """While a stand-in works, which is no operation of the module's own."""
        self.count()
        self._active = False
        try:
            yield
        finally:
            self._active = True


def _in_turn(parent: nn.Module, known: dict[int, nn.Module]) -> set[tuple[str, str]]:
    """The names of two children, the second of which takes what the first, a layer, gives, as it
    is, once a call; and nothing else sees that. So it is in every run that does not fail.

    Args:
        known: modules by their ids, to share where attributes are copied.
    """
    if "forward" in vars(parent):
        return set()
    first = next(child for child in parent._modules.values() if child and _source(child))
    inputs = getattr(first, _FEATURES[_source(first)][0])
    if _source(first) is nn.Linear:
        shapes = [(2, inputs), (1, 2, inputs), (2, 3, 2, inputs)]
    else:
        shapes = [(2, inputs, 8, 8), (1, inputs, 8, 8), (inputs, 8, 8)]
    found = []
    for shape in shapes:
        try:
            seen = [_run(parent, shape, training, known) for training in (False, True)]
        except _Endless:
            return set()
        # A forward that refuses a shape says nothing of it; one that fails in training alone may
        # do anything there.
        if seen != [None, None]:
            found += [pairs or set() for pairs in seen]
    return found[0] if found and all(pairs == found[0] for pairs in found) else set()


def _run(
    parent: nn.Module, shape: tuple[int, ...], training: bool, known: dict[int, nn.Module]
) -> set[tuple[str, str]] | None:
    """What `_in_turn` gives, of one run; ``None``: it failed."""
    watch, probe = _Watch(), copy.copy(parent)
    children = {k: child for k, child in parent._modules.items() if child is not None}
    stands = {k: _StandIn(child, watch).train(training) for k, child in children.items()}
    try:
        own = {k: v for k, v in vars(parent).items() if k not in _SHARED}
        own = copy.deepcopy(own, dict(known))
        probe.__dict__ = {**vars(parent), **own, "_modules": stands, "training": training}
        with torch.random.fork_rng([]), torch.no_grad(), watch:
            output = type(parent).forward(probe, torch.zeros(shape))
    except Exception:
        return None
    kept = [t for t in tree_leaves((output, list(vars(probe).values()))) if isinstance(t, Tensor)]
    seen = Counter(_memory(t) for t in (*watch.used, *kept))
    seen.update(_memory(t) for stand in stands.values() for call in stand.calls for t in call)
    found = set()
    for name, stand in stands.items():
        if stand.outputs is None or len(stand.results) != 1 or seen[_memory(stand.results[0])] != 1:
            continue
        for after, other in stands.items():
            taken = [t for call in other.calls for t in call]
            if len(taken) == 1 and taken[0] is stand.results[0]:
                found.add((name, after))
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
