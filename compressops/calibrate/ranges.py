"""The range of a layer's input, and the 8-bit scale and zero point that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor

from compressops.calibrate.config import Calibrate

# Values that percentiles and errors are computed from: a percentile of 99.9 then has 262 beyond it.
SAMPLE = 2**18
# One that nobody takes for data: keys from the seed of the data would go with their values.
_SEED = 0x63616C6962726174
# Parts of the range that are tried for the least error: all of it, down to a tenth.
_PARTS = 91
_TINY = torch.finfo(torch.float32).tiny


class Range:
    """The values of a tensor that is seen in pieces: their range, and a uniform sample of them.

    The sample is the same each time, and no value's chance depends on the piece that it was in.

    Args:
        sample: whether to keep one; ``minmax`` needs none.
    """

    def __init__(self, sample: bool = True) -> None:
        self.low, self.high, self.count = 0.0, 0.0, 0
        self._values: Tensor | None = None
        self._keys: Tensor | None = None
        self._generator: torch.Generator | None = None
        self._sample = sample

    def add(self, x: Tensor) -> None:
        """Take account of ``x``, float, any shape.

        Raises:
            ValueError: it holds NaN or infinities.
        """
        x = x.detach().float().flatten()
        if not x.numel():
            return
        low, high = (float(value) for value in torch.aminmax(x))
        if not (low >= -_LARGEST and high <= _LARGEST):
            raise ValueError(
                f"an input of {x.numel()} values holds {int((~x.isfinite()).sum())} that are NaN "
                f"or infinite"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += x.numel()
        if not self._sample:
            return
        if self._generator is None:
            self._generator = torch.Generator(x.device).manual_seed(_SEED)
            self._values, self._keys = x[:0], x[:0]
        # Of all values ever seen those with the smallest random keys.
        keys = torch.rand(x.shape, generator=self._generator, device=x.device)
        if self.count > SAMPLE:
            keys, kept = keys.topk(min(SAMPLE, len(keys)), largest=False)
            x = x[kept]
        self._values, self._keys = torch.cat([self._values, x]), torch.cat([self._keys, keys])
        if len(self._keys) > SAMPLE:
            self._keys, kept = self._keys.topk(SAMPLE, largest=False)
            self._values = self._values[kept]

    def quantization(self, config: Calibrate) -> tuple[float, int | None]:
        """Scale and zero point (``None``: symmetric) by the method of ``config.activations``.

        ``q = clip(round(x / scale) + zero, −128, 127)``, as `ops.int8_linear` takes them. The range
        always holds 0, which is exact.
        """
        if self.count and config.activations == "percentile":
            return _from_range(*self._percentile(config), config.symmetric)
        if self.count and config.activations == "mse":
            return self._least_error(config.symmetric)
        return _from_range(self.low, self.high, config.symmetric)

    def _percentile(self, config: Calibrate) -> tuple[float, float]:
        outside = 1 - config.percentile / 100
        if config.symmetric:
            most = float(torch.quantile(self._values.abs(), 1 - outside))
            return -most, most
        low, high = (float(torch.quantile(self._values, q)) for q in (outside / 2, 1 - outside / 2))
        return min(low, 0.0), max(high, 0.0)

    def _least_error(self, symmetric: bool) -> tuple[float, int | None]:
        best, least = (1.0, None), float("inf")
        for part in torch.linspace(1, 0.1, _PARTS).tolist():
            scale, zero = _from_range(self.low * part, self.high * part, symmetric)
            shift = zero or 0
            q = (torch.round(self._values / scale) + shift).clamp(-128, 127)
            error = float(((q - shift) * scale - self._values).square().sum(dtype=torch.float64))
            if error < least:
                best, least = (scale, zero), error
        return best


def _from_range(low: float, high: float, symmetric: bool) -> tuple[float, int | None]:
    if symmetric:
        return max(max(-low, high) / 127, _TINY) if low or high else 1.0, None
    if low == high:
        return 1.0, 0
    scale = max(high / 255 - low / 255, _TINY)
    return scale, max(-128, min(127, round(-128 - low / scale)))


_LARGEST = torch.finfo(torch.float32).max
