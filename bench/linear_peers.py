"""Other libraries' linear layers on integer weights, for bench_int8_linear.py and
bench_packed_linear.py.

Every factory takes a `Case` and gives a `Peer`, or raises `MissingError` with the reason why there
is none. All take float32 activations on ``threads`` threads; weights are packed beforehand, and
quantizing the activations is part of the call unless said otherwise:

- torch fp32: `F.linear`, and on weights that MKL packed (``torch fp32 packed``).
- torch onednn, fbgemm, x86: `quantized.linear_dynamic` of that engine, one range for all rows.
- torch._int_mm: the integer product alone, of activations quantized before.
- torchao int8: `Int8DynamicActivationInt8WeightConfig`, not compiled. What it has for 4 bits on a
  CPU is the kernel of torch int4.
- onnxruntime int8: DynamicQuantizeLinear, MatMulInteger and the scales, fused by the library.
- OpenVINO int8, int4: a compressed weight, with dynamic quantization of the activations.
- torch int4: `_weight_int4pack_mm_for_cpu`, bfloat16 activations converted before.
- onnxruntime int4: MatMulNBits at accuracy level 4 (int8 activations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peers import MissingError, Peer, imported
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """``x`` [M, K] times ``weight`` [N, K], both float32. ``group``: inputs that share a scale."""

    x: Tensor
    weight: Tensor
    threads: int
    group: int = 128

    @property
    def operations(self) -> float:
        """Two for each product."""
        return 2.0 * len(self.x) * self.weight.numel()


def symmetric(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales [..., 1] of the last dimension."""
    top = 2 ** (bits - 1) - 1
    scales = rows.abs().amax(-1, keepdim=True) / top
    return (rows / scales).round().to(torch.int8), scales


def torch_fp32(case: Case) -> Peer:
    def run() -> Tensor:
        return F.linear(case.x, case.weight)

    return Peer(run, run)


def torch_fp32_packed(case: Case) -> Peer:
    if not torch.backends.mkl.is_available():
        raise MissingError("this torch has no MKL")
    M = len(case.x)
    packed = torch.ops.mkl._mkl_reorder_linear_weight(case.weight, M)

    def run() -> Tensor:
        return torch.ops.mkl._mkl_linear(case.x, packed, case.weight, None, M)

    return Peer(run, run)


def torch_dynamic(case: Case, engine: str) -> Peer:
    if engine not in torch.backends.quantized.supported_engines:
        raise MissingError(f"this torch has no engine {engine}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        scales = case.weight.abs().amax(1) / 127
        weight = torch.quantize_per_channel(
            case.weight, scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8
        )
        packed = torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = before

    def run() -> Tensor:
        return torch.ops.quantized.linear_dynamic(case.x, packed)

    return Peer(run, run)


def torch_int_mm(case: Case) -> Peer:
    q, x_scales = symmetric(case.x, 8)
    codes, scales = symmetric(case.weight, 8)
    transposed = codes.t().contiguous()

    def run() -> Tensor:
        return torch._int_mm(q, transposed)

    return Peer(run, lambda: run() * x_scales * scales.t(), "no quantization, no scales")


def torchao_int8(case: Case) -> Peer:
    quantization = imported("torchao.quantization")
    layer = torch.nn.Linear(*case.weight.shape[::-1], bias=False)
    layer.weight = torch.nn.Parameter(case.weight.clone(), requires_grad=False)
    # A module in a module: quantize_ replaces the weights of children.
    model = torch.nn.Sequential(layer)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())

    def run() -> Tensor:
        return model(case.x)

    return Peer(run, run, imported("torchao").__version__)


def torch_int4(case: Case) -> Peer:
    N, K = case.weight.shape
    if K % case.group or N % 16:
        raise MissingError(f"it needs whole groups and N of a multiple of 16, got {N} × {K}")
    codes, scales = symmetric(case.weight.view(N, -1, case.group), 4)
    unsigned = (codes.int() + 8).view(N, K)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    pairs = torch.stack([scales[..., 0].t(), torch.zeros_like(scales[..., 0]).t()], -1)
    pairs, x = pairs.contiguous().bfloat16(), case.x.bfloat16()

    def run() -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, case.group, pairs)

    return Peer(run, lambda: run().float(), "bfloat16")


def _onnx_session(case: Case, nodes: list, weights: dict, domains: dict[str, int]) -> Peer:
    ort, onnx = imported("onnxruntime"), imported("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    out = torch.empty(len(case.x), len(case.weight))
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **node[3]) for node in nodes],
        "layer",
        [helper.make_tensor_value_info("x", kind, list(case.x.shape))],
        [helper.make_tensor_value_info("y", kind, list(out.shape))],
        [onnx.numpy_helper.from_array(t.contiguous().numpy(), n) for n, t in weights.items()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    # Between calls, where its threads would go on spinning while others are timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(case.x.numpy()))
    binding.bind_output("y", "cpu", 0, out.numpy().dtype, list(out.shape), out.data_ptr())

    def result() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return Peer(lambda: session.run_with_iobinding(binding), result, ort.__version__)


def onnxruntime_int8(case: Case) -> Peer:
    codes, scales = symmetric(case.weight, 8)
    to = imported("onnx").TensorProto.FLOAT
    nodes = [
        ("DynamicQuantizeLinear", ["x"], ["q", "x_scale", "x_zero"], {}),
        ("MatMulInteger", ["q", "w", "x_zero", "w_zero"], ["sums"], {}),
        ("Cast", ["sums"], ["float_sums"], {"to": to}),
        ("Mul", ["x_scale", "w_scale"], ["scale"], {}),
        ("Mul", ["float_sums", "scale"], ["y"], {}),
    ]
    weights = {
        "w": codes.t(),
        "w_zero": torch.zeros(len(codes), dtype=torch.int8),
        "w_scale": scales[:, 0],
    }
    return _onnx_session(case, nodes, weights, {"": 17})


def onnxruntime_int4(case: Case) -> Peer:
    N, K = case.weight.shape
    if K % case.group:
        raise MissingError(f"{K} inputs are no whole groups of {case.group}")
    codes, scales = symmetric(case.weight.view(N, -1, case.group), 4)
    unsigned = (codes + 8).to(torch.uint8)
    packed = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    options = {
        **{"K": K, "N": N, "bits": 4, "block_size": case.group, "accuracy_level": 4},
        "domain": "com.microsoft",
    }
    nodes = [("MatMulNBits", ["x", "w", "w_scale"], ["y"], options)]
    weights = {"w": packed, "w_scale": scales.flatten()}
    return _onnx_session(case, nodes, weights, {"": 17, "com.microsoft": 1})


def openvino(case: Case, bits: int) -> Peer:
    ov = imported("openvino")
    ops = imported("openvino.opset13")
    N, K = case.weight.shape
    group = K if bits == 8 else case.group
    if K % group:
        raise MissingError(f"{K} inputs are no whole groups of {group}")
    codes, scales = symmetric(case.weight.view(N, -1, group), bits)
    if bits == 4:
        low = codes[..., 0::2].to(torch.uint8) & 15
        data = (low | codes[..., 1::2].to(torch.uint8) << 4).numpy()
        codes_node = ov.Tensor(data, list(codes.shape), ov.Type.i4)
    else:
        codes_node = codes.numpy()
    weight = ops.multiply(
        ops.convert(ops.constant(codes_node), "f32"), ops.constant(scales.numpy())
    )
    x = ops.parameter(list(case.x.shape), dtype=ov.Type.f32)
    y = ops.matmul(x, ops.reshape(weight, [N, K], False), False, True)
    options = {
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": min(group, 128),
    }
    model = ov.Core().compile_model(ov.Model([y], [x]), "CPU", options)
    request, out = model.create_infer_request(), torch.empty(len(case.x), N)
    request.set_input_tensor(ov.Tensor(case.x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(out.numpy(), shared_memory=True))

    def result() -> Tensor:
        request.infer()
        return out

    return Peer(request.infer, result, ov.__version__.split("-")[0])


FLOAT: dict[str, Callable[[Case], Peer]] = {
    "torch fp32": torch_fp32,
    "torch fp32 packed": torch_fp32_packed,
}
INT8: dict[str, Callable[[Case], Peer]] = {
    "torch onednn": lambda case: torch_dynamic(case, "onednn"),
    "torch fbgemm": lambda case: torch_dynamic(case, "fbgemm"),
    "torch x86": lambda case: torch_dynamic(case, "x86"),
    "torch._int_mm": torch_int_mm,
    "torchao int8": torchao_int8,
    "onnxruntime int8": onnxruntime_int8,
    "OpenVINO int8": lambda case: openvino(case, 8),
}
INT4: dict[str, Callable[[Case], Peer]] = {
    "torch int4": torch_int4,
    "onnxruntime int4": onnxruntime_int4,
    "OpenVINO int4": lambda case: openvino(case, 4),
}
