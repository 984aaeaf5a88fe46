"""What layers put out on data, for factors that keep the outputs and not the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressops.formats.decompose import Spectrum
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

    def bias(self, bias: Tensor, kept: Tensor) -> Tensor:
        """The bias that takes up what the mean of the outputs loses, where they are projected on
        the columns of ``kept``."""
        mean = self.mean()
        return bias + (mean - kept @ (kept.mT @ mean)).to(bias)

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


def watch(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]
) -> dict[str, Outputs]:
    """Run ``model``, in eval mode, on ``batches`` (each a tensor, or a tuple or dict of arguments)
    and sum up what ``layers`` put out.

    Raises:
        ValueError: NaN or infinities, naming the layer.
    """
    found = {name: Outputs(module) for name, module in layers.items()}

    def hook(name: str):
        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            try:
                found[name].add(args[0], output)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
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
