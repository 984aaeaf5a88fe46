"""Which of the modules that could run a layer does: the one that is measured fastest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from compressops import kernels
from compressops.measure import median_times
from compressops.nn import PackedModule


def fastest(
    dense: nn.Module, rivals: Sequence[PackedModule], inputs: tuple[Any, ...]
) -> tuple[int | None, list[str]]:
    """Measure modules against each other and the dense layer, all in turns, on ``inputs``.

    Of a block-sparse module the density is said, and its break-even: the density at which it would
    take as long as the fastest of those, if its time grows evenly from that of no blocks at all.

    Args:
        dense: the layer that is replaced.
        rivals: modules that run another kernel than it does.
        inputs: the arguments of a call.

    Returns:
        The index of the fastest, or ``None`` where the dense layer is; what is to be said of each.
    """
    variants = [kernels.rivals(rival, dense, inputs[0]) for rival in rivals]
    hollow = {i: rival.hollow() for i, rival in enumerate(rivals) if hasattr(rival, "hollow")}
    # The dense layer, and its own variants, once for all.
    others = {label: other for _, named in variants for label, other in named.items()}
    modules = [*(m for mine, _ in variants for m in mine), *others.values(), *hollow.values()]
    # The dense layer that is replaced has its weight at hand, and does not compute it.
    with parametrize.cached():
        times = iter(median_times([lambda m=m: m(*inputs) for m in modules]))
        ours = [min(next(times) for _ in mine) for mine, _ in variants]
        theirs = {label: next(times) for label in others}
        empty = {i: next(times) for i in hollow}
    best = min(range(len(rivals)), key=ours.__getitem__)
    taken = best if ours[best] < min(theirs.values()) else None
    whys, said = [], [f"{label} {seconds * 1e6:.0f} µs" for label, seconds in theirs.items()]
    for i, (rival, mine) in enumerate(zip(rivals, ours, strict=True)):
        name = type(rival).__name__ + ("" if i == taken else " not used")
        why = f"{name}: measured {', '.join([f'{mine * 1e6:.0f} µs', *said])}"
        if i in empty:
            density = rival.block_density
            even = break_even(density, mine, min(theirs.values()), empty[i])
            why += f"; density of blocks {density:.1%}, break-even {even:.1%}"
        whys.append(why)
    return taken, whys


def assume(new: PackedModule, prefer: str) -> tuple[bool, str]:
    """Whether a module that runs another kernel than the dense layer is taken unmeasured, and the
    reason."""
    name = type(new).__name__
    if prefer == "size":
        return True, f"{name}: prefer='size'"
    backend = new.backend()
    if (why := new.assumed_faster()) is not None:
        return True, f"{name}: {why}, not measured"
    # What blocks gain depends on their number and the activations.
    if backend == "torch" or hasattr(new, "hollow"):
        return False, f"{name} not used: prefer='size' asks for it, or a measurement"
    if backend == "eager":
        return False, f"{name} not used: its op has no compiled kernel here"
    return True, f"{name}: its {backend} kernel is assumed faster, not measured"


def break_even(density: float, ours: float, dense: float, nothing: float) -> float:
    """The density, from 0 to 1, at which a block-sparse layer takes as long as the dense one.

    Args:
        density: of the layer that takes ``ours`` seconds.
        ours, dense, nothing: seconds of it, of the dense layer, and of the block-sparse layer of
            density 0.
    """
    if dense <= nothing:
        return 0.0
    # Times that do not grow with the density are all below the dense layer's, or all above.
    if ours <= nothing:
        return 1.0
    return min(1.0, density * (dense - nothing) / (ours - nothing))
