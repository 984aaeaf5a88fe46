"""The one place that chooses a backend.

Each op has up to four kernels: ``cuda`` and ``cpu`` (the compiled libraries), ``triton``, and
``eager`` (plain PyTorch, the reference). On a device they are tried in ``ORDER``;
``COMPRESSOPS_BACKEND=NAME`` or ``with compressops.backend(NAME):`` asks for one by name, which then
serves or raises. Tensors are never moved between devices.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from . import schema

ORDER = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}
BACKENDS = ("cuda", "triton", "cpu", "eager")

Kernel = Callable[..., torch.Tensor]

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_ORDINARY = _PLAIN | {type(None), bool, int, float, str}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve."""


_eager: dict[str, Kernel] = {}
_guards: dict[str, Callable[..., str | None]] = {}
_preparing: set[str] = set()
_override: ContextVar[str | None] = ContextVar("compressops_backend", default=None)
_chosen: dict[tuple[str, str, str | None], tuple[str, Kernel]] = {}


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_environment: str | None = None
if os.environ.get("COMPRESSOPS_BACKEND"):
    _environment = _checked_name(os.environ["COMPRESSOPS_BACKEND"], "COMPRESSOPS_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op on the backend ``name`` inside the ``with`` block (of this thread or task).

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"eager"``.

    Raises:
        ValueError: there is no backend of that name.
        BackendError: (at a call of an op) the backend cannot serve there.
    """
    token = _override.set(_checked_name(name, "backend name"))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def load_cpu_library() -> str | None:
    """Register the compiled CPU kernels; the reason where that is not possible."""
    try:
        importlib.import_module("compressops._C")
    except ImportError as error:
        if importlib.util.find_spec("compressops._C") is None:
            return "the C++ extension is not built (no compiler at installation)"
        return f"the C++ extension does not load: {error}"
    return None


@functools.cache
def _load_cuda_library() -> str | None:
    spec = importlib.util.find_spec("compressops._cuda")
    if spec is None or spec.origin is None:
        return "the CUDA extension is not built (no nvcc at installation)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the CUDA extension does not load: {error}"
    return None


@functools.cache
def _load_triton(op: str) -> tuple[Kernel | None, str | None]:
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    try:
        # What writes into a buffer that it is given is the sibling of what makes one.
        module = importlib.import_module(f"compressops.triton_kernels.{op.removesuffix('_out')}")
    except ImportError as error:
        return None, f"the Triton kernel does not load: {error}"
    return getattr(module, op), None


def _has_native_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{schema.NATIVE}::{op}", key)


def _find(op: str, name: str, device: str) -> tuple[Kernel | None, str | None]:
    """The kernel of ``op`` on a backend, or the reason why it cannot serve on the device type."""
    if device == "cuda" and not torch.cuda.is_available():
        return None, "torch sees no CUDA device"
    if name == "eager":
        return _eager[op], None
    if name == "triton":
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return None, f"triton needs a GPU, not {device} (or TRITON_INTERPRET=1 set at start)"
        return _load_triton(op)
    if name != device:
        return None, f"its kernels run on {name} tensors, not on {device} ones"
    reason = load_cpu_library() if name == "cpu" else _load_cuda_library()
    if reason is None and not _has_native_kernel(op, name.upper()):
        reason = "it has no kernel for this op"
    if reason:
        return None, reason
    # What the overload calls: its own Python frame costs a call a quarter of a microsecond.
    native = schema.native_op(op)._op
    return (_guarded(op, native) if name == "cuda" else native), None


def _guarded(op: str, kernel: Kernel) -> Kernel:
    """A CUDA kernel behind the guard of its op, if it has one."""
    guard = _guards.get(op)
    if guard is None:
        return kernel

    @functools.wraps(guard)
    def call(*args, **kwargs):
        why = guard(*args, **kwargs)
        return (kernel if why is None else _instead_of_cuda(op, why))(*args, **kwargs)

    return call


def _instead_of_cuda(op: str, why: str) -> Kernel:
    """The kernel for arguments that the CUDA kernel refuses."""
    if (_override.get() or _environment) == "cuda":
        raise BackendError(f"{op}: backend 'cuda' cannot serve {why}")
    key = (op, "cuda", why)
    if key not in _chosen:
        _warn_once(f"compressops: {op}: backend 'cuda' does not serve {why}")
        _chosen[key] = _first(op, "cuda", ORDER["cuda"][1:])
    return _chosen[key][1]


def choose(op: str, device: str) -> Kernel:
    """The kernel that serves ``op`` on a device type (``"cpu"``, ``"cuda"``, …) now.

    Raises:
        BackendError: a backend was asked for by name and cannot serve.
    """
    return _serving(op, device)[1]


def name(op: str, device: str) -> str:
    """The name of the backend that serves ``op`` on a device type now; raises as `choose`."""
    return _serving(op, device)[0]


def _serving(op: str, device: str) -> tuple[str, Kernel]:
    asked = _override.get() or _environment
    key = (op, device, asked)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(op, device, asked)
    return chosen


def _choose(op: str, device: str, asked: str | None) -> tuple[str, Kernel]:
    if op in _preparing:
        for candidate in (*([asked] if asked else []), *ORDER.get(device, ()), "eager"):
            kernel, _ = _find(op, candidate, device)
            if kernel is not None:
                return candidate, kernel
    if asked is not None:
        kernel, reason = _find(op, asked, device)
        if kernel is None:
            others = "; ".join(
                f"{other}: {_find(op, other, device)[1] or 'can'}"
                for other in BACKENDS
                if other != asked
            )
            raise BackendError(
                f"{op}: backend {asked!r} cannot serve {device} tensors: {reason}. Others: {others}"
            )
        return asked, kernel
    return _first(op, device, ORDER.get(device, ("eager",)))


def _first(op: str, device: str, candidates: tuple[str, ...]) -> tuple[str, Kernel]:
    """Name and kernel of the first that can serve."""
    for candidate in candidates:
        kernel, reason = _find(op, candidate, device)
        if kernel is not None:
            return candidate, kernel
        _warn_once(f"compressops: backend {candidate!r} does not serve {device} tensors: {reason}")
    raise AssertionError("eager serves everywhere")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message + "; falling back", RuntimeWarning, stacklevel=6)


def table() -> list[tuple[str, str, str, str | None]]:
    """Rows ``(op, device type, backend, reason)``; the reason is ``None`` where it can serve."""
    return [
        (op, device, name, _find(op, name, device)[1])
        for op in schema.SCHEMAS
        for device in ORDER
        for name in BACKENDS
    ]


def register(
    op: str,
    *,
    eager: Kernel,
    fake: Kernel,
    check: Callable[..., object],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., object] | None = None,
    guard: Callable[..., str | None] | None = None,
    prepares: bool = False,
) -> Kernel:
    """Wire an op of ``schema.SCHEMAS`` to its kernels; returns the callable that runs it.

    Args:
        op: its name.
        eager: the reference in plain PyTorch, on any device.
        fake: the shapes and dtypes of its result, for ``torch.compile``.
        check: raises ``ValueError`` for arguments that the op does not take. Compiled kernels make
            the same checks themselves.
        setup_context, backward: its autograd formula, where a gradient means anything.
        guard: asked before each call of the CUDA kernel: raises ``ValueError`` for what that cannot
            check without waiting for the GPU, and gives the reason where it has no kernel for such
            arguments, so that the next backend serves; or ``None``.
        prepares: it puts the operands of other ops in their form. A backend that was asked for by
            name for those serves it where it can, and else, without a word, another.
    """
    if prepares:
        _preparing.add(op)
    if guard is not None:
        _guards[op] = guard

    def checked(kernel: Kernel) -> Kernel:
        @functools.wraps(kernel)
        def call(*args, **kwargs):
            check(*args, **kwargs)
            return kernel(*args, **kwargs)

        return call

    _eager[op] = checked(eager)
    public = schema.public_op(op)

    def run(*args, **kwargs) -> torch.Tensor:
        try:
            return choose(op, args[0].device.type)(*args, **kwargs)
        except (AttributeError, RuntimeError):
            _require_tensors(op, args)
            raise

    # On every device: where no kernel was written for one, eager serves.
    schema.library(schema.PUBLIC).impl(op, run, "CompositeExplicitAutograd")
    for namespace in (schema.PUBLIC, schema.NATIVE):
        torch.library.register_fake(f"{namespace}::{op}", checked(fake))
    if backward is not None:
        torch.library.register_autograd(
            f"{schema.PUBLIC}::{op}", backward, setup_context=setup_context
        )

    def call(*args) -> torch.Tensor:
        # The dispatcher's way through a Python op with a gradient takes 10 µs, more than a small
        # layer's kernel. Nobody who has no gradient to take and nothing to record needs it.
        if torch.compiler.is_compiling() or _is_watched(args):
            if forward_ad._current_level >= 0:
                _refuse_tangents(op, args)
            return public(*args)
        try:
            # The device takes a quarter of a microsecond to name its type.
            device = "cpu" if args[0].is_cpu else args[0].device.type
            return _serving(op, device)[1](*args)
        except (AttributeError, RuntimeError):
            _require_tensors(op, args)
            raise

    return call


def _require_tensors(op: str, args: tuple) -> None:
    """Of a call that failed: the dispatcher lets ``None`` pass as a tensor."""
    for argument, value in zip(schema.public_op(op)._schema.arguments, args, strict=False):
        if str(argument.type) == "Tensor" and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{op}: argument '{argument.name}' must be a tensor, got {value!r}"
            ) from None


def _refuse_tangents(op: str, args: tuple) -> None:
    """No op has a formula for forward-mode differentiation, and torch would drop the tangent."""
    for argument, value in zip(schema.public_op(op)._schema.arguments, args, strict=False):
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{op}: argument '{argument.name}' has a tangent, and forward-mode differentiation "
                "is not supported; use reverse mode"
            )


def _is_watched(args: tuple) -> bool:
    """Whether autograd, a mode, a tracer or a value's own class has a say in a call."""
    if _len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    if torch._C._is_tracing():  # torch.jit.trace: the kernel's own op has no gradient
        return True
    # Arguments that are all of these types are the rule, and isinstance takes longer.
    # What torch.fx traces with is no tensor, and records a call like one.
    if not _ORDINARY.issuperset(map(type, args)) and any(
        type(value) not in _ORDINARY and hasattr(value, "__torch_function__") for value in args
    ):
        return True
    if torch.is_grad_enabled():
        for value in args:  # faster than any() of a generator
            if type(value) in _PLAIN and value.requires_grad:
                return True
    return False
