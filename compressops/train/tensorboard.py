"""Curves for TensorBoard: losses by name, learning rate, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compressops.formats.registry import shown


class Curves:
    """Event files of one run in ``folder``, which ``tensorboard --logdir`` shows.

    A run that was killed and goes on writes to the same folder; what it had written beyond ``done``
    is then not shown twice.

    Args:
        folder: made if it is not there.
        done: steps that are done already.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError: ``folder`` is no path.
    """

    def __init__(self, folder: str | Path, done: int = 0) -> None:
        check(folder)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step, by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """To the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        self._writer.close()


def check(folder: str | Path) -> None:
    """Raises as `Curves`, and writes nothing."""
    if not isinstance(folder, (str, Path)):
        raise TypeError(f"tensorboard must be a folder, got {shown(folder)}")
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tensorboard={str(folder)!r} needs the package tensorboard: "
            "pip install 'compressops[train]'"
        ) from error
