"""The choice of a backend: automatic, by name, and with reasons."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import compressops as co
from compressops import backends, schema


def arguments():
    weight = torch.randint(-127, 128, (5, 8), dtype=torch.int8)
    return torch.randn(3, 8), weight, torch.ones(5), weight.sum(1, dtype=torch.int32)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_every_op_has_a_public_function_and_all_backends_in_the_table() -> None:
    rows = backends.table()
    for op in schema.SCHEMAS:
        assert callable(getattr(co.ops, op))
        assert {name for o, _, name, _ in rows if o == op} == set(backends.BACKENDS)
        assert (op, "cpu", "eager", None) in rows


def test_unknown_backend_is_an_error_that_lists_the_names() -> None:
    with (
        pytest.raises(ValueError, match="cuda, triton, cpu, eager, got 'cudnn'"),
        co.backend("cudnn"),
    ):
        pass
    done = run("import compressops", COMPRESSOPS_BACKEND="fast")
    assert "COMPRESSOPS_BACKEND must be one of cuda, triton, cpu, eager, got 'fast'" in done.stderr


def test_a_backend_asked_for_by_name_serves_or_raises_with_reasons() -> None:
    with co.backend("cuda"), pytest.raises(co.BackendError) as error:
        co.ops.int8_linear(*arguments())
    message = str(error.value)
    assert "int8_linear: backend 'cuda' cannot serve cpu tensors" in message
    assert "eager: can" in message


def test_what_prepares_operands_serves_whatever_is_asked_for(recwarn) -> None:
    weight = torch.randint(-128, 128, (5, 7), dtype=torch.int8)
    expected = co.ops.int8_linear_pack(weight)
    for name in ("cuda", "triton", "eager"):
        with co.backend(name):
            assert backends.name("pack_panels", "cpu") == ("eager" if name == "eager" else "cpu")
            for one, other in zip(co.ops.int8_linear_pack(weight), expected, strict=True):
                assert torch.equal(one, other)
    assert not recwarn


def test_override_nests_and_ends() -> None:
    args = arguments()
    with co.backend("eager"):
        with co.backend("cuda"), pytest.raises(co.BackendError):
            co.ops.int8_linear(*args)
        assert backends.choose("int8_linear", "cpu") is backends._eager["int8_linear"]
    assert backends.choose("int8_linear", "cpu") is not backends._eager["int8_linear"]


def test_override_counts_inside_a_compiled_graph() -> None:
    args = arguments()
    compiled = torch.compile(co.ops.int8_linear, fullgraph=True, backend="aot_eager")
    expected = compiled(*args)
    with co.backend("eager"):
        assert torch.equal(compiled(*args), expected)
    with co.backend("cuda"), pytest.raises(co.BackendError):
        compiled(*args)


def test_environment_names_the_backend() -> None:
    code = """
import torch, compressops as co
w = torch.ones(5, 8, dtype=torch.int8)
co.ops.int8_linear(torch.ones(3, 8), w, torch.ones(5), w.sum(1, dtype=torch.int32))
"""
    assert run(code, COMPRESSOPS_BACKEND="eager").returncode == 0
    assert "backend 'cuda' cannot serve cpu tensors" in run(code, COMPRESSOPS_BACKEND="cuda").stderr


def test_works_without_the_compiled_library_and_says_so_once() -> None:
    code = """
import sys
sys.modules["compressops._C"] = None
import torch, compressops as co
w = torch.ones(5, 8, dtype=torch.int8)
for _ in range(3):
    y = co.ops.int8_linear(torch.ones(3, 8), w, torch.ones(5), w.sum(1, dtype=torch.int32))
assert torch.equal(y, torch.full((3, 5), 8.0)), y
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("falling back") == 1, done.stderr


def test_importing_does_not_initialise_cuda_or_import_heavy_packages() -> None:
    code = """
import sys, compressops, torch
assert not torch.cuda.is_initialized()
heavy = {"triton", "accelerate", "transformers", "matplotlib", "tensorly"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_isa_limit() -> None:
    _C = pytest.importorskip("compressops._C")
    order = ["avx2", "avx512", "avx512_vnni", "avx512_vbmi2"]
    try:
        _C.limit_isa("native")
        native = _C.cpu_features()
        for at, name in enumerate(["baseline", *order]):
            _C.limit_isa(name)
            allowed = order[:at]
            assert _C.cpu_features() == {isa: native[isa] and isa in allowed for isa in order}
    finally:
        _C.limit_isa("native")
    with pytest.raises(ValueError, match="got 'sse9'"):
        _C.limit_isa("sse9")


def _watched_call(x: torch.Tensor) -> torch.Tensor:
    weight, sums = co.ops.int8_linear_pack(torch.ones(3, 4, dtype=torch.int8))
    return co.ops.int8_linear(x, weight, torch.ones(3), sums)


def test_calls_that_somebody_watches_take_the_dispatchers_way() -> None:
    """All others go straight to the kernel."""
    seen: list[str] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 4)
    with Dispatch():
        _watched_call(x)
    assert "compressops.int8_linear.default" in seen

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(f"own {func}")
            return super().__torch_function__(func, types, args, kwargs or {})

    _watched_call(x.as_subclass(Own))
    assert "own compressops.int8_linear.default" in seen
    y = _watched_call(x.requires_grad_())
    # A kernel that was called past autograd has a grad_fn too, which says that it has no gradient.
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    with torch.no_grad():
        assert _watched_call(x).grad_fn is None
    graph = make_fx(_watched_call)(x.detach())
    assert any(node.target is schema.public_op("int8_linear") for node in graph.graph.nodes)


def test_forward_mode_is_refused_where_it_would_lose_a_tangent() -> None:
    """torch's own registration of gradients answers with a tangent of zeros."""
    x, *rest = arguments()
    match = r"int8_linear: argument 'x' has a tangent"
    with pytest.raises(NotImplementedError, match=match):
        torch.func.jvp(lambda x: co.ops.int8_linear(x, *rest), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=match):
            co.ops.int8_linear(dual, *rest)
        result = co.ops.int8_linear(x, *rest)  # what has none goes on
    assert torch.equal(result, co.ops.int8_linear(x, *rest))


def test_fx_records_a_call() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _watched_call(x)

    traced, x = torch.fx.symbolic_trace(Model()), torch.randn(2, 4)
    assert any(node.target is schema.public_op("int8_linear") for node in traced.graph.nodes)
    assert torch.equal(traced(x), _watched_call(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_trace_has_the_op_that_has_a_gradient() -> None:
    x = torch.randn(2, 4)
    with torch.no_grad():
        traced = torch.jit.trace(_watched_call, x)
    x.requires_grad_()
    grad, expected = (torch.autograd.grad(call(x).sum(), x)[0] for call in (traced, _watched_call))
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_what_is_no_tensor_is_an_error_that_names_it(at: int, public: bool, name: str) -> None:
    """The dispatcher takes None for a tensor, and a kernel would be asked for its device."""
    call = torch.ops.compressops.int8_linear if public else co.ops.int8_linear
    args = list(arguments())
    args[at] = None
    argument = ("x", "weight", "weight_scales", "weight_sums")[at]
    with (
        co.backend(name),
        pytest.raises(ValueError, match=f"int8_linear: argument '{argument}' must be .* got None"),
    ):
        call(*args)


def test_arguments_that_the_cuda_kernel_refuses_go_to_the_next_backend(monkeypatch) -> None:
    op = "bsr_linear"
    served = []
    monkeypatch.setattr(
        backends, "_find", lambda op, name, device: (lambda *_: served.append(name), None)
    )
    monkeypatch.setattr(backends, "_chosen", {})
    guarded = backends._guarded(op, lambda *_: served.append("cuda"))
    crow, col = (torch.tensor(t, dtype=torch.int32) for t in ([0, 1, 2], [0, 1]))

    def call(r: int, c: int) -> None:
        guarded(torch.randn(2, 2 * c), torch.randn(2, r, c), crow, col, 2 * r)

    call(16, 4)
    with pytest.warns(RuntimeWarning, match="bsr_linear: backend 'cuda' does not serve blocks of"):
        call(16, 5)
    call(16, 5)  # said once
    assert served == ["cuda", "triton", "triton"]
    with co.backend("cuda"), pytest.raises(co.BackendError, match=r"blocks of 3 × 4: .* 16"):
        call(3, 4)
    col[1] = 2  # was found sound before it was written to
    with pytest.raises(ValueError, match="bsr_linear: argument 'col_indices' must be from 0 to 1"):
        call(16, 4)
