"""How integers are fitted to data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compressops.formats.registry import check_choice, check_int

WEIGHTS = ("minmax", "mse", "gptq")
ACTIVATIONS = ("dynamic", "minmax", "percentile", "mse")


@dataclass(frozen=True)
class Calibrate:
    """How `convert` fits the integers (`Int`) that its config asks for, to weights and to data.

    Args:
        data: batches that the model runs on, each one as ``example_inputs`` of `convert` is; an
            iterable, read once. ``None``: ``example_inputs``, as the only batch. Some hundred
            samples of what the model will see; needed unless activations are dynamic and weights
            fitted without data.
        weights: ``"minmax"``: each row's (or group's) scale from its range; ``"mse"``: the part
            of the range with the least squared rounding error; ``"gptq"``: linear layers (other
            ones as ``"mse"``) by error compensation on the data (`gptq`).
        activations: of layers that become `Int8Linear`. ``"dynamic"``: each row's own range, no
            data; or one static range: ``"minmax"`` of all that was observed, ``"percentile"``,
            ``"mse"``, the part of it with the least squared rounding error. Static ranges spare
            the search for each row's, and clip what exceeds them.
        percentile: so many percent of the values are in the range, above 50 and at most 100.
        symmetric: whether activations have no zero point, static or dynamic.
        damping: of `gptq`: the part of the mean diagonal added to the Hessian's, above 0.
        activation_order: of `gptq`: columns by descending activation, not as they stand.
        block_size: of `gptq`: columns after which the rest is updated at once; changes the time
            that it takes, and results by float rounding only.

    Raises:
        ValueError: a value that is none of these; the message names it.
        TypeError: ``data`` is a single input, or no iterable.
    """

    data: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    weights: str = "mse"
    activations: str = "dynamic"
    percentile: float = 99.9
    symmetric: bool = True
    damping: float = 0.01
    activation_order: bool = False
    block_size: int = 128

    def __post_init__(self) -> None:
        owner = "Calibrate"
        check_choice(owner, "weights", self.weights, WEIGHTS)
        check_choice(owner, "activations", self.activations, ACTIVATIONS)
        _check_number("percentile", self.percentile, 50, 100)
        _check_number("damping", self.damping, 0, 1)
        check_int(owner, "block_size", self.block_size, 1, 2**31 - 1)
        for name in ("symmetric", "activation_order"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{owner}: {name} must be true or false, got {getattr(self, name)!r}"
                )
        single = isinstance(self.data, (Tensor, Mapping, str))
        if self.data is not None and (single or not isinstance(self.data, Iterable)):
            raise TypeError(
                f"{owner}: data must be an iterable of batches, such as [inputs], got a "
                f"{type(self.data).__name__}"
            )

    @property
    def static(self) -> bool:
        """Whether activations get one range, observed on the data."""
        return self.activations != "dynamic"

    def batches(self, example_inputs: Any) -> list[Any]:
        """The data, or ``example_inputs`` in its place.

        Raises:
            ValueError: there is neither.
        """
        data = [] if self.data is None else list(self.data)
        if self.data is None and example_inputs is not None:
            data = [example_inputs]
        if not data:
            raise ValueError(
                f"calibration: weights={self.weights!r} with activations={self.activations!r} "
                f"needs data or example_inputs, got {'none' if self.data is None else 'no batch'}"
            )
        return data


def _check_number(name: str, value: object, low: float, high: float) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low < value <= high
    if not fits:
        raise ValueError(f"Calibrate: {name} must be a number in ({low}, {high}], got {value!r}")
