"""Random numbers that are a function of a seed, whichever generator a data set draws from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of torch, numpy and ``random``; afterwards they go on as if
    nothing had been drawn."""
    # Old data sets draw from numpy's global generator, so that is the one to seed.
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the devices too, which are not forked here.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before[0])  # noqa: NPY002
            random.setstate(before[1])
