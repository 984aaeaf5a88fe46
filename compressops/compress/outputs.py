"""What layers see and put out on data, for factors that keep the outputs and not the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.formats.decompose import Spectrum, unfolded
from compressops.measure import call, evaluating


@dataclass
class Outputs:
    """Sums over a layer's calls; ``W x`` is an output without its bias.

    Of a linear layer with more outputs than inputs it keeps the moment of the inputs, which is
    smaller.
    """

    module: nn.Module
    samples: int = 0
    rows: int = 0
    total: Tensor | None = None
    moment: Tensor | None = field(default=None, repr=False)

    @property
    def of_inputs(self) -> bool:
        weight = self.module.weight
        return isinstance(self.module, nn.Linear) and weight.shape[0] > weight.shape[1]

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """One call's input and output.

        Raises:
            ValueError: they hold NaN or infinities.
        """
        seen = x if self.of_inputs else y
        if isinstance(self.module, nn.Linear):
            seen = seen.reshape(-1, seen.shape[-1]).mT
        else:
            seen = (seen if seen.dim() == 4 else seen[None]).transpose(0, 1).flatten(1)
        bias = None if self.of_inputs else self.module.bias
        seen = seen.float() if bias is None else seen.float() - bias.float()[:, None]
        moment, total = (seen @ seen.mT).double(), seen.double().sum(1)
        if not bool(torch.isfinite(moment).all()):
            raise ValueError("calibration: its inputs or outputs hold NaN or infinite values")
        self.moment = moment if self.moment is None else self.moment + moment
        self.total = total if self.total is None else self.total + total
        self.rows += seen.shape[1]
        batched = x.dim() == 4 if isinstance(self.module, nn.Conv2d) else x.dim() > 1
        self.samples += len(x) if batched else 1

    @property
    def positions(self) -> float:
        """Output positions of a sample."""
        return self.rows / max(1, self.samples)

    def mean(self) -> Tensor:
        """Of the outputs, float64 ``[out]``."""
        mean = self.total / max(1, self.rows)
        return self.module.weight.detach().double() @ mean if self.of_inputs else mean

    def bias(self, bias: Tensor, spectrum: Spectrum, rank: int) -> Tensor:
        """The bias that takes up what the mean of the outputs loses at a rank."""
        mean, (p, q) = self.mean(), spectrum.projection(rank)
        return bias + (mean - p @ (q @ mean)).to(bias)

    def spectrum(self) -> Spectrum | None:
        """Of the outputs; of what varies in them where a bias can take up the mean. ``None``: the
        layer was not called."""
        if not self.rows:
            return None
        moment = self.moment
        if self.module.bias is not None:
            mean = self.total / self.rows
            moment = moment - self.rows * torch.outer(mean, mean)
        if not self.of_inputs:
            return Spectrum.of_outputs(moment)
        # W X and W S have the same left singular vectors where S S.T = X X.T.
        squares, vectors = torch.linalg.eigh(moment)
        root = vectors * squares.clamp(min=0).sqrt()
        return Spectrum.of(self.module.weight.detach().double() @ root)


@dataclass
class Columns:
    """Sums over what a convolution sees of data below each column of its kernel, for factors of
    the form ``"spatial"``: see `Spectrum.of_columns`.

    ``P_a`` is what lies below column a at each output position, ``[I·h, positions]``.
    """

    module: nn.Conv2d
    samples: int = 0
    rows: int = 0
    total: Tensor | None = None
    patches: Tensor | None = field(default=None, repr=False)
    shifts: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """One call's input and output.

        Raises:
            ValueError: the input holds NaN or infinities.
        """
        module = self.module
        mode = {} if module.padding_mode == "zeros" else {"mode": module.padding_mode}
        (h, w), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
        for image in x if x.dim() == 4 else x[None]:
            padded = F.pad(image[None].float(), module._reversed_padding_repeated_twice, **mode)
            tall = F.unfold(padded, (h, 1), (dh, 1), stride=(sh, 1))[0]
            tall = tall.view(len(tall), -1, padded.shape[-1])
            span = sw * (y.shape[-1] - 1) + 1
            below = [tall[..., a * dw : a * dw + span : sw] for a in range(w)]
            # A column of the image lies below several of the kernel, and is multiplied once.
            times = torch.zeros(padded.shape[-1], dtype=tall.dtype, device=tall.device)
            for a in range(w):
                times[a * dw : a * dw + span : sw] += 1
            each = (tall * times).flatten(1)
            patches, total = (each @ tall.flatten(1).mT).double(), each.sum(1, dtype=torch.float64)
            flat = torch.stack(below).flatten(1)
            shifts = (flat @ flat.mT).double()
            if not bool(torch.isfinite(patches).all()):
                raise ValueError("calibration: its inputs hold NaN or infinite values")
            first = self.patches is None
            self.patches = patches if first else self.patches + patches
            self.shifts = shifts if first else self.shifts + shifts
            self.total = total if first else self.total + total
            self.rows += y.shape[-2] * y.shape[-1]
            self.samples += 1

    @property
    def positions(self) -> float:
        """Output positions of a sample."""
        return self.rows / max(1, self.samples)

    def mean(self) -> Tensor:
        """Of the patches below all columns, float64 ``[I·h]``."""
        return self.total / max(1, self.rows * len(self.shifts))

    def bias(self, bias: Tensor, spectrum: Spectrum, rank: int) -> Tensor:
        """The bias that takes up what the mean of the outputs loses at a rank."""
        p, q = spectrum.projection(rank)
        mean = unfolded("spatial", self.module.weight).double() @ self.mean()
        return bias + (mean - p @ (q @ mean)).view(len(bias), -1).sum(1).to(bias)

    def spectrum(self) -> Spectrum | None:
        """Of the outputs, see `Outputs.spectrum`."""
        if not self.rows:
            return None
        patches, shifts = self.patches, self.shifts
        if self.module.bias is not None:
            mean = self.mean()
            patches = patches - self.rows * len(shifts) * torch.outer(mean, mean)
            shifts = shifts - self.rows * mean.square().sum()
        # As many positions more as a patch has entries, alike in all directions: few positions say
        # little of so many directions, and what they miss is left to the weight.
        patches = patches + patches.trace() / self.rows * torch.eye(len(patches)).to(patches)
        # One of the two has the scale of the sums, and the other one that of 1.
        return Spectrum.of_columns(
            self.module.weight.detach(), patches, shifts / shifts.trace().clamp(min=1e-30)
        )


def watch(
    model: nn.Module, layers: Mapping[tuple[str, str], nn.Module], batches: Iterable[Any]
) -> dict[tuple[str, str], Outputs | Columns]:
    """Run ``model``, in eval mode, on ``batches`` (each a tensor, or a tuple or dict of arguments)
    and sum up what is to be known of ``layers``.

    Args:
        layers: by name and the form of the factors that they are to have.

    Raises:
        ValueError: NaN or infinities, naming the layer.
    """
    found = {
        (name, form): Columns(module) if form == "spatial" else Outputs(module)
        for (name, form), module in layers.items()
    }

    def hook(key: tuple[str, str]):
        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            try:
                found[key].add(args[0], output)
            except ValueError as error:
                name = key[0]
                raise ValueError(f"layer {name!r}: {error}") from error

        return look

    handles = [module.register_forward_hook(hook(key)) for key, module in layers.items()]
    try:
        with evaluating(model):
            for batch in batches:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def sensitivities(
    model: nn.Module, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor], batch: Any
) -> dict[str, float]:
    """Relative squared error of the model's first output where one layer has another weight.

    Args:
        layers: by name.
        weights: of each, the other weight.
        batch: see `watch`.
    """
    with evaluating(model):
        reference = output_of(model, batch)
        return {
            name: output_error(model, [(module.weight, weights[name])], batch, reference)
            for name, module in layers.items()
        }


def output_error(
    model: nn.Module, changes: Sequence[tuple[Tensor, Tensor]], batch: Any, reference: Tensor
) -> float:
    """Relative squared error of the model's first output against ``reference``, where the first of
    each two tensors has the values of the second."""
    before = [tensor.data for tensor, _ in changes]
    try:
        for tensor, values in changes:
            tensor.data = values.to(tensor.dtype)
        changed = output_of(model, batch)
    finally:
        for (tensor, _), values in zip(changes, before, strict=True):
            tensor.data = values
    scale = reference.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return ((changed - reference).square().sum() / scale).item()


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """The model's first output, float64."""
    return _first(call(model, batch)).double()


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        values = output.values() if isinstance(output, Mapping) else output
        output = next(iter(values))
    return copy.copy(output)
