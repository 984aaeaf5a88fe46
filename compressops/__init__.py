"""compressops: chain-compress PyTorch networks and keep every factor in file, memory and time."""

from . import backends, ops
from .backends import BackendError, backend

__version__ = "0.1.0"

__all__ = ["BackendError", "__version__", "backend", "backends", "ops"]
