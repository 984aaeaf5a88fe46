"""Low-rank factors in the place of weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops.compress import checks
from compressops.compress.outputs import Columns, Outputs, sensitivities, watch
from compressops.compress.parametrizations import Factors, register
from compressops.compress.ranks import CHANNELS, Options, Point, allocate, points
from compressops.compress.search import search_ranks
from compressops.compress.select import select, tied_groups
from compressops.compress.stage import Stage
from compressops.formats.decompose import Spectrum, decompose
from compressops.formats.lowrank import FORMS, LowRank

# "auto" takes the cheaper of these, layer by layer.
_AUTO = ("matrix", "spatial")
# The forms whose factors can be fitted to what layers put out.
_CALIBRATED = ("matrix", "spatial")


@dataclass(frozen=True)
class Factorize(Stage):
    """Replace the weights of linear layers and convolutions by products of small factors.

    The layer computes its weight from the factors, which `Retrain` trains; `Prune`, `Quantize` and
    `Encode` work on each factor (``"layer.u"``, ``"layer.core"``, ``"layer.v"``, or all of them by
    the layer's name). `convert` then runs the factors one after the other. No layer is factorized
    into something with more weights or more multiply-accumulates than it has: it stays as it is.

    Exactly one of ``rank``, ``ranks``, ``energy``, ``macs`` and ``params`` is given.

    Args:
        form: of the factors, see `LowRank`; linear layers and 1×1 convolutions always have the form
            ``"matrix"``. ``"auto"``: ``"matrix"`` or ``"spatial"``, whichever loses less.
        rank: of every selected layer; two of them for ``"tucker"`` (outputs, inputs).
        ranks: ``(glob, form, rank)`` for layers one by one; the first match counts, others stay.
        energy: part of the squared singular values that each layer keeps, at least.
        macs: budget: part of the selected layers' multiply-accumulates that may remain. Without
            ``calibration`` every output position counts once, whatever the size of the images.
        params: budget: part of the selected layers' weights that may remain. Ranks are then any;
            for ``macs`` and ``energy`` those from 16 on are multiples of 16, which kernels compute
            at once.
        sensitivity: the budget weighs a layer's error by what it does to the model's output,
            measured on the first batch, one layer at a time.
        search: trials of optuna that weigh the layers' errors for the budget, judged by the error
            of the model's output on the first batch; 0: none. Each takes a run of the model.
        calibration: batches of training data: factors of the forms ``"matrix"`` and ``"spatial"``
            then keep the layer's outputs on them, ``‖(W − U V) X‖`` least (of ``"spatial"`` nearly,
            see `Spectrum.of_columns`), and not the weight. A layer that has a bias takes the mean
            of what is lost into it.
        layers, exclude: globs over the names of the layers.

    A budget is shared out greedily by error for what is saved, which for these errors is optimal
    (`compressops.compress.ranks.allocate`).

    Outputs are observed, and no inputs whitened: with S Sᵀ = X Xᵀ the whitened weight W S (SVD-LLM,
    Wang et al. 2024, arXiv 2403.07378) has the left singular vectors of W X, and projecting on
    those (Zhang et al. 2016, arXiv 1505.06798, § 3.1) needs no inverse of S.
    """

    form: str = "matrix"
    rank: int | tuple[int, int] | None = None
    ranks: tuple[tuple[str, str, Any], ...] = ()
    energy: float | None = None
    macs: float | None = None
    params: float | None = None
    sensitivity: bool = False
    search: int = 0
    calibration: int = 0
    layers: str | tuple[str, ...] = "*"
    exclude: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.choice("form", self.form, (*FORMS, "auto"))
        given = [name for name in _WAYS if getattr(self, name) not in (None, ())]
        if len(given) != 1:
            raise ValueError(
                f"give one of {', '.join(_WAYS)}: got {', '.join(given) or 'none of them'}"
            )
        for name in ("energy", "macs", "params"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), 0, 1, open_low=True)
        if self.rank is not None:
            if self.form == "auto":
                raise ValueError("form='auto' chooses by error, and rank is given: name the form")
            object.__setattr__(self, "rank", LowRank(self.rank, self.form).rank)
        checks.integer("search", self.search)
        if self.form == "cp" and (self.energy is not None or self.sensitivity or self.search):
            raise ValueError("form='cp' has no singular values: give rank, ranks, macs or params")
        checks.flag("sensitivity", self.sensitivity)
        checks.integer("calibration", self.calibration)
        for name, value in (("sensitivity", self.sensitivity), ("search", self.search)):
            if value and not self.calibration:
                raise ValueError(f"{name}={value} needs calibration batches, got calibration=0")
            if value and self.macs is None and self.params is None:
                raise ValueError(f"{name}={value} weighs a budget: give macs or params")
        object.__setattr__(self, "ranks", _checked_ranks(self.ranks))
        object.__setattr__(self, "layers", checks.globs("layers", self.layers))
        object.__setattr__(self, "exclude", checks.globs("exclude", self.exclude))

    @property
    def label(self) -> str:
        way = next(name for name in _WAYS if getattr(self, name) not in (None, ()))
        value = f"of {len(self.ranks)} layers" if way == "ranks" else getattr(self, way)
        return f"Factorize {self.form} {way} {value}"

    def validate(self, model: nn.Module, later: Sequence[Stage]) -> None:
        self._selected(model)

    def attach(self, model: nn.Module) -> None:
        self.apply(model, ())

    def apply(self, model: nn.Module, batches: Iterable[Any]) -> Factorize:
        """Factorize ``model`` in place, calibrated on the first ``calibration`` of ``batches``,
        each a tensor, or a tuple or dict of the model's arguments.

        Returns:
            the stage with the ``ranks`` that were found, which `attach` repeats without data.

        Raises:
            ImportError: ``"tucker"`` and ``"cp"`` need tensorly, ``search`` optuna.
            ValueError: a layer is named that cannot be factorized, nothing gets smaller, or the
                budget is below what the lowest ranks take.
        """
        groups = self._selected(model)
        layers = {name: group[0] for name, group in groups.items()}
        batches = list(itertools.islice(batches, self.calibration))
        forms = {(n, form): m for n, m in layers.items() for form in self._forms(n, m)}
        seen = watch(model, forms, batches) if batches else {}
        spectra = {
            key: found
            for key, one in seen.items()
            if key[1] in _CALIBRATED and (found := one.spectrum())
        }
        chosen = self._choose(model, layers, seen, spectra, batches)
        if not chosen:
            raise ValueError(f"{self}: no selected layer ({', '.join(layers)}) gets smaller by it")
        for name, layout in chosen.items():
            key = name, layout.form
            _factorize(groups[name], layout, spectra.get(key), seen.get(key))
        ranks = tuple((name, layout.form, layout.rank) for name, layout in chosen.items())
        none = dict.fromkeys(("rank", "energy", "macs", "params"))
        return dataclasses.replace(self, **none, ranks=ranks, sensitivity=False, search=0)

    def _choose(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        seen: Mapping[tuple[str, str], Outputs | Columns],
        spectra: Mapping[tuple[str, str], Spectrum],
        batches: list[Any],
    ) -> dict[str, LowRank]:
        """The layout of each layer that is to be factorized."""
        if self.rank is not None:
            return self._named(
                {name: (self._form(m), self.rank) for name, m in layers.items()}, layers
            )
        if self.ranks:
            found = {}
            for name in layers:
                match = next((r for r in self.ranks if fnmatchcase(name, r[0])), None)
                if match is not None:
                    found[name] = match[1:]
            return self._named(found, layers)
        positions = {name: one.positions for (name, _), one in seen.items()}
        options = {
            name: Options(
                [_dense(module), *self._points(name, module, spectra)], positions.get(name, 1.0)
            )
            for name, module in layers.items()
        }
        if self.energy is not None:
            chosen = {
                name: min(
                    (p for p in found.points if p.error <= 1 - self.energy + 1e-12),
                    key=lambda point: (point.macs, point.error),
                )
                for name, found in options.items()
            }
        else:
            cost = "macs" if self.macs is not None else "entries"
            part = self.macs if self.macs is not None else self.params
            if self.form == "cp":
                chosen = {name: _within(found, cost, part) for name, found in options.items()}
            else:
                if self.sensitivity:
                    options = _weighed(model, layers, options, spectra, batches[:1])
                if self.search and batches:
                    found = layers, options, seen, spectra, batches[0]
                    chosen = search_ranks(model, *found, cost, part, self.search)
                else:
                    chosen = allocate(options, cost, part)
        return {name: point.layout for name, point in chosen.items() if point.layout is not None}

    def _form(self, module: nn.Module) -> str:
        return self.form if _kernel(module) else "matrix"

    def _forms(self, name: str, module: nn.Module) -> tuple[str, ...]:
        """Those that a layer may get."""
        if self.ranks:
            match = next((form for glob, form, _ in self.ranks if fnmatchcase(name, glob)), None)
            form = match if _kernel(module) else match and "matrix"
            return () if form is None else (form,)
        form = self._form(module)
        return _AUTO if form == "auto" else (form,)

    def _points(
        self, name: str, module: nn.Module, spectra: Mapping[tuple[str, str], Spectrum]
    ) -> list[Point]:
        """Those of all forms that the layer may take."""
        weight, stride = module.weight.detach(), _stride(module)
        # Who asks for weights and not for time can have every rank.
        multiple = CHANNELS if self.params is None else 1
        return [
            point
            for form in self._forms(name, module)
            for point in points(form, weight, stride, spectra.get((name, form)), multiple)
        ]

    def _named(
        self, given: Mapping[str, tuple[str, Any]], layers: Mapping[str, nn.Module]
    ) -> dict[str, LowRank]:
        """Layouts of ranks that were asked for, where they make the layer smaller."""
        found = {}
        for name, (form, rank) in given.items():
            module = layers[name]
            if form == "matrix" and isinstance(rank, tuple):
                # A 1×1 convolution or linear layer among those of a Tucker rank.
                rank = min(rank)
            shape, layout = tuple(module.weight.shape), LowRank(rank, form)
            if _exceeds(layout, shape):
                continue
            cost = max(layout.macs(shape, _stride(module)), layout.entries(shape))
            if cost < module.weight.numel():
                found[name] = layout
        return found

    def _selected(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """The layers that can be factorized, those together that share a weight.

        Raises:
            ValueError: one is named that cannot be, or none can.
        """
        found = select(model, self.layers, self.exclude)
        names = {id(module): name for name, module in found.items()}
        globs = (self.layers,) if isinstance(self.layers, str) else self.layers
        groups, reasons = {}, {}
        for group in tied_groups(found):
            name = names[id(group[0])]
            why = next(filter(None, map(_why_not, group)), None)
            if why is None:
                groups[name] = group
            elif name in globs or parametrize.is_parametrized(group[0], "weight"):
                raise ValueError(f"layer {name!r} cannot be factorized: {why}")
            else:
                reasons[name] = why
        if not groups:
            raise ValueError(
                f"layers={self.layers!r} leaves none that can be factorized: "
                + "; ".join(f"{name!r}: {why}" for name, why in reasons.items())
            )
        for glob, _, _ in self.ranks:
            if not any(fnmatchcase(name, glob) for name in groups):
                raise ValueError(f"ranks: {glob!r} matches none of the layers {', '.join(groups)}")
        return groups


_WAYS = ("rank", "ranks", "energy", "macs", "params")


def _checked_ranks(ranks: Any) -> tuple[tuple[str, str, Any], ...]:
    if not isinstance(ranks, (tuple, list)):
        raise TypeError(f"ranks must be a list of [glob, form, rank], got {ranks!r}")
    found = []
    for entry in ranks:
        if not isinstance(entry, (tuple, list)) or len(entry) != 3 or not isinstance(entry[0], str):
            raise TypeError(f"ranks must be a list of [glob, form, rank], got {entry!r} in it")
        layout = LowRank(entry[2], entry[1])
        found.append((entry[0], layout.form, layout.rank))
    return tuple(found)


def _why_not(module: nn.Module) -> str | None:
    """Why a layer cannot be factorized; ``None``: it can."""
    if getattr(module, "is_factor", False):
        return "it is a factor"
    kind = parametrize.type_before_parametrizations(module)
    if kind not in (nn.Linear, nn.Conv2d):
        return f"only Linear and Conv2d can be, it is a {kind.__name__}"
    if parametrize.is_parametrized(module, "weight"):
        return "it was compressed before; Factorize first, the rest works on its factors"
    if getattr(module, "groups", 1) != 1:
        return f"it has {module.groups} groups"
    return None


def _kernel(module: nn.Module) -> bool:
    """Whether the layer is a convolution of more than 1×1."""
    return isinstance(module, nn.Conv2d) and tuple(module.kernel_size) != (1, 1)


def _stride(module: nn.Module) -> tuple[int, int]:
    return tuple(getattr(module, "stride", (1, 1)))


def _dense(module: nn.Module) -> Point:
    size = module.weight.numel()
    return Point(None, size, size, 0.0)


def _exceeds(layout: LowRank, shape: tuple[int, ...]) -> bool:
    largest = LowRank.largest(layout.form, shape)
    if layout.form != "tucker":
        return layout.rank > largest
    return any(rank > most for rank, most in zip(layout.rank, largest, strict=True))


def _within(options: Options, cost: str, part: float) -> Point:
    """The highest rank within a part of the layer's own cost."""
    budget = part * getattr(options.dense, cost)
    fitting = [p for p in options.points if p.layout and getattr(p, cost) <= budget]
    return max(fitting, key=lambda point: point.entries, default=options.dense)


def _weighed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    options: Mapping[str, Options],
    spectra: Mapping[tuple[str, str], Spectrum],
    batches: list[Any],
) -> dict[str, Options]:
    """The options with the sensitivity of each layer, measured where it keeps half its products."""
    if not batches:
        return dict(options)
    probes: dict[str, Point] = {}
    for name, found in options.items():
        lossy = [point for point in found.points if point.layout is not None and point.error > 0]
        if lossy:
            probes[name] = min(lossy, key=lambda p, half=found.dense.macs / 2: abs(p.macs - half))
    weights: dict[str, Tensor] = {}
    for name, point in probes.items():
        weight = layers[name].weight.detach()
        factors = decompose(point.layout, weight, spectra.get((name, point.layout.form)))
        weights[name] = point.layout.compose(factors, tuple(weight.shape))
    probed = {name: layers[name] for name in probes}
    measured = sensitivities(model, probed, weights, batches[0])
    return {
        name: dataclasses.replace(found, sensitivity=measured[name] / probes[name].error)
        if name in probes
        else found
        for name, found in options.items()
    }


@torch.no_grad()
def _factorize(
    group: list[nn.Module],
    layout: LowRank,
    spectrum: Spectrum | None,
    seen: Outputs | Columns | None,
) -> None:
    weight = group[0].weight.detach()
    factors = decompose(layout, weight, spectrum)
    if spectrum is not None:
        for module in group:
            if module.bias is not None:
                module.bias.copy_(seen.bias(module.bias, spectrum, layout.rank))
    computed = Factors(layout, factors, weight.shape)
    for module in group:
        register(module, computed)
        # It has no entries, and an optimizer no use for it.
        module.parametrizations["weight"].original.requires_grad_(False)
