"""The number axis: how one entry of a weight is written.

A number turns a float weight into integer codes and back. ``quantize`` and ``dequantize`` work on
dense tensors of any shape; where parameters go by rows or groups, the weight is seen as the matrix
``[rows, columns]`` of :func:`matrix_shape`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressops.formats.registry import Axis, check_choice, check_fraction, check_int

FLOAT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Integer lengths that are ever chosen: beyond them a float32 weight over- or underflows anyway,
# and 2**(bits - integer_bits) stays the product of two normal float32 numbers.
MIN_INTEGER_BITS, MAX_INTEGER_BITS = -120, 120


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, columns)`` of a weight: ``weight.flatten(1)``, and one row below two dimensions."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def check_weight(weight: Tensor) -> None:
    """Raise a ``ValueError`` unless ``weight`` is a finite float32, bfloat16 or float16 tensor."""
    check_dtype(weight.dtype)
    if bad := int((~torch.isfinite(weight)).sum()):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} holds {bad} values that are NaN or infinite"
        )


def check_dtype(dtype: torch.dtype) -> str:
    """Name of a dtype that weights may have, else a ``ValueError`` that names it."""
    for name, known in FLOAT_DTYPES.items():
        if dtype == known:
            return name
    raise ValueError(f"weight dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype}")


class Number(Axis, abc.ABC):
    """How one entry is written: ``bits`` wide codes, and the parameters that decode them."""

    bits: int
    is_float: bool = False

    @property
    def code_dtype(self) -> torch.dtype:
        """Signed integer dtype that holds one code: int8, int16 or int32."""
        return torch.int8 if self.bits <= 8 else torch.int16 if self.bits <= 16 else torch.int32

    def for_network(self, weights: Iterable[Tensor]) -> Number:
        """This number with what it shares over a whole network fitted to ``weights``.

        Only ``FixedPoint(integer_bits=None)`` has such a thing; every other number is returned
        unchanged.
        """
        del weights
        return self

    def param_shapes(
        self, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each parameter of a weight of ``shape``."""
        del shape
        return {}

    def check_params(self, params: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        """Raise a ``ValueError`` unless ``params`` are those of a weight of ``shape``."""
        expected = self.param_shapes(shape)
        if set(params) != set(expected):
            raise ValueError(f"{self} has parameters {sorted(expected)}, got {sorted(params)}")
        for name, (dtype, size) in expected.items():
            given = params[name]
            if given.dtype != dtype or tuple(given.shape) != size:
                raise ValueError(
                    f"{self}: {name} of a weight {list(shape)} must be {dtype} {list(size)}, "
                    f"got {given.dtype} {list(given.shape)}"
                )

    @abc.abstractmethod
    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        """Parameters for ``weight`` (float, any shape), on its device; see ``param_shapes``.

        Raises:
            ValueError: ``weight`` is of another dtype, or holds NaN or infinities.
        """

    @abc.abstractmethod
    def _round(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Codes as float32 of the same shape; NaN stays NaN."""

    def quantize(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Codes of a finite ``weight``: ``code_dtype``, signed, same shape."""
        return self._round(weight, params).to(self.code_dtype)

    @abc.abstractmethod
    def dequantize(
        self, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The values of ``codes`` (integer or float, any shape), of ``dtype``; never −0.0."""

    def dequantize_into(
        self, out: Tensor | None, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """What `dequantize` returns, in ``out`` unless that is ``None``."""
        values = self.dequantize(codes, params, dtype)
        return values if out is None else out.copy_(values)

    def fake_quantize(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        """``dequantize(quantize(weight))`` in the dtype of ``weight``, without gradients of its
        own; NaN stays NaN."""
        return self.dequantize(self._round(weight, params), params, weight.dtype)

    def zero_codes(self, out: Tensor, params: dict[str, Tensor]) -> Tensor:
        """``out``, of the weight's shape and the codes' dtype, as the codes of a weight that is 0.0
        everywhere."""
        del params
        return out.zero_()


@dataclass(frozen=True)
class Float(Number):
    """IEEE floating point as it is: a code is the bit pattern of ``dtype``.

    Keeps every bit where the weight has this dtype: −0.0 and the payload of a NaN too.

    Args:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """

    dtype: str = "float32"
    is_float = True

    def __post_init__(self) -> None:
        check_choice("Float", "dtype", self.dtype, tuple(FLOAT_DTYPES))

    @property
    def bits(self) -> int:
        return 32 if self.dtype == "float32" else 16

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        check_dtype(weight.dtype)
        return {}

    def _round(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        return weight.to(FLOAT_DTYPES[self.dtype])

    def quantize(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        return self._round(weight, params).contiguous().view(self.code_dtype)

    def dequantize(
        self, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return codes.contiguous().view(FLOAT_DTYPES[self.dtype]).to(dtype)

    def fake_quantize(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        return self._round(weight, params).to(weight.dtype)


def _powers_of_two(exponent: Tensor | int) -> tuple[Tensor | float, Tensor | float]:
    """Two factors whose product is ``2**exponent``; |exponent| ≤ 250.

    Put together from their bits, both are normal numbers: ``torch.exp2`` is not exact on every
    device, and 2**exponent alone may leave float32's range.
    """
    if isinstance(exponent, int):
        half = exponent // 2
        return 2.0**half, 2.0 ** (exponent - half)
    exponent = exponent.to(torch.int32)
    half = torch.div(exponent, 2, rounding_mode="floor")
    first, second = (((part + 127) << 23).view(torch.float32) for part in (half, exponent - half))
    return first, second


def _times_power_of_two(x: Tensor, exponent: Tensor | int) -> Tensor:
    """``x · 2**exponent`` in float32, rounded once; |exponent| ≤ 250."""
    for power in _powers_of_two(exponent):
        x = x * power
    return x


def _overflow_rate(weight: Tensor, bits: int, integer_bits: int) -> float:
    """Fraction of the nonzero float32 values that clip at this integer length."""
    q = torch.round(_times_power_of_two(weight, bits - integer_bits))
    clipped = (q < -(2 ** (bits - 1))) | (q > 2 ** (bits - 1) - 1)
    return float(clipped.sum()) / max(1, int(torch.count_nonzero(weight)))


def _fit_integer_bits(weights: list[Tensor], bits: int, overflow: float) -> int:
    """Smallest integer length that clips at most a fraction ``overflow`` of the nonzero values."""
    for weight in weights:
        check_weight(weight)
    flat = [w.detach().float().flatten() for w in weights if w.numel()]
    nonzero = sum(int(torch.count_nonzero(w)) for w in flat)
    if not nonzero:
        return 0
    largest = max(float(w.abs().max()) for w in flat)
    # |x| < 2**e and p = e + 2 leave |q| < 2**(bits − 2) or so: nothing can clip.
    best = max(MIN_INTEGER_BITS, min(MAX_INTEGER_BITS, math.frexp(largest)[1] + 2))
    for p in range(best - 1, MIN_INTEGER_BITS - 1, -1):
        clipped = sum(_overflow_rate(w, bits, p) * int(torch.count_nonzero(w)) for w in flat)
        if clipped > overflow * nonzero + 1e-6:
            break
        best = p
    return best


class _BinaryPoint(Number):
    """Two's complement with a binary point: q = clip(round(x·2^(w−p)), −2^(w−1), 2^(w−1)−1),
    value q / 2^(w−p), with word width w (sign included) and integer length p, which may be
    negative. Rounds half to even."""

    def _integer_bits(self, params: dict[str, Tensor]) -> Tensor | int:
        raise NotImplementedError

    def _round(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        q = _times_power_of_two(weight.float(), self.bits - self._integer_bits(params))
        return torch.round(q).clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def dequantize(
        self, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        x = _times_power_of_two(codes.float(), self._integer_bits(params) - self.bits)
        # Adding zero after the cast turns −0.0, however it came about, into 0.0.
        return x.to(dtype) + 0.0

    def dequantize_into(
        self, out: Tensor | None, codes: Tensor, params: dict[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        if out is None or not out.dtype == dtype == torch.float32:
            return super().dequantize_into(out, codes, params, dtype)
        # In place: floats take more than all else that decoding does.
        out.copy_(codes)
        for power in _powers_of_two(self._integer_bits(params) - self.bits):
            out.mul_(power)
        return out.add_(0.0)


@dataclass(frozen=True)
class FixedPoint(_BinaryPoint):
    """Fixed point with one integer length for the whole network (Courbariaux et al. 2015,
    arXiv:1412.7024, as in Mayo).

    Args:
        bits: word width w, sign included, 2 to 16.
        integer_bits: integer length p, sign included, −120 to 120. ``None``: to be fitted by
            :meth:`for_network`.
        overflow: the fraction of nonzero values that ``for_network`` may let clip, in [0, 1).
    """

    bits: int
    integer_bits: int | None = None
    overflow: float = 0.0

    def __post_init__(self) -> None:
        check_int("FixedPoint", "bits", self.bits, 2, 16)
        if self.integer_bits is not None:
            check_int(
                "FixedPoint", "integer_bits", self.integer_bits, MIN_INTEGER_BITS, MAX_INTEGER_BITS
            )
        check_fraction("FixedPoint", "overflow", self.overflow, 0, 1)

    def for_network(self, weights: Iterable[Tensor]) -> FixedPoint:
        if self.integer_bits is not None:
            return self
        p = _fit_integer_bits(list(weights), self.bits, self.overflow)
        return replace(self, integer_bits=p)

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        check_weight(weight)
        self._integer_bits({})
        return {}

    def _integer_bits(self, params: dict[str, Tensor]) -> int:
        if self.integer_bits is None:
            raise ValueError(
                f"{self}: integer_bits is None; for_network(weights) chooses one for a network"
            )
        return self.integer_bits


@dataclass(frozen=True)
class DynamicFixedPoint(_BinaryPoint):
    """Fixed point with an integer length per tensor: the smallest whose overflow rate stays
    within a budget (Courbariaux et al. 2015, arXiv:1412.7024, as in Mayo).

    The rate counts nonzero values only, so that pruned entries don't stretch the budget.
    Parameters: ``integer_bits``, int8 ``[]``.

    Args:
        bits: word width w, sign included, 2 to 16.
        overflow: the fraction of nonzero values that may clip, in [0, 1).
    """

    bits: int
    overflow: float = 0.0

    def __post_init__(self) -> None:
        check_int("DynamicFixedPoint", "bits", self.bits, 2, 16)
        check_fraction("DynamicFixedPoint", "overflow", self.overflow, 0, 1)

    def param_shapes(
        self, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"integer_bits": (torch.int8, ())}

    def check_params(self, params: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        super().check_params(params, shape)
        p = int(params["integer_bits"])
        check_int("DynamicFixedPoint", "integer_bits", p, MIN_INTEGER_BITS, MAX_INTEGER_BITS)

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        p = _fit_integer_bits([weight], self.bits, self.overflow)
        return {"integer_bits": torch.tensor(p, dtype=torch.int8, device=weight.device)}

    def _integer_bits(self, params: dict[str, Tensor]) -> Tensor:
        return params["integer_bits"].to(torch.int32)
