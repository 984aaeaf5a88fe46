"""Other libraries' 3×3 convolutions, one layer each, for bench_winograd.py.

Every factory takes a `Case` and gives a `Peer`, or raises `MissingError` with the reason why there
is none. All compute float32 on ``threads`` threads. What each one's figure includes:

- torch: `conv2d` on NCHW and channels_last tensors; with weights packed once by oneDNN, as
  `torch.compile` calls it; and on oneDNN's own blocked tensors (``to_mkldnn()``).
- oneDNN (Debian's libdnnl-dev, 2.x): blocked layouts, no reorders; and from NCHW to NCHW.
- ncnn: activations packed beforehand and left packed; one image a call, as it has no batch.
- OpenVINO, onnxruntime: a network of one convolution, NCHW to NCHW, on fixed buffers.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import MissingError, Peer, compiled, imported
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One layer: ``x`` [N, C, H, W] and ``weight`` [K, C, r, r], contiguous, stride 1."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    padding: int
    threads: int

    @property
    def flops(self) -> float:
        """Of the direct convolution: two for each product."""
        n, k, h, w = self.out_shape
        return 2.0 * n * h * w * k * self.weight[0].numel()

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Of the result."""
        r, p = self.weight.shape[2], self.padding
        n, _, h, w = self.x.shape
        return n, len(self.weight), h + 2 * p - r + 1, w + 2 * p - r + 1


# torch


def torch_conv(case: Case, memory_format: torch.memory_format) -> Peer:
    x = case.x.to(memory_format=memory_format)
    weight = case.weight.to(memory_format=memory_format)

    def run() -> Tensor:
        return F.conv2d(x, weight, case.bias, padding=case.padding)

    return Peer(run, run)


def torch_packed(case: Case) -> Peer:
    if not torch.backends.mkldnn.is_available():
        raise MissingError("this torch has no oneDNN")
    ones, pads = [1, 1], [case.padding] * 2
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
        case.weight.to_mkldnn(), pads, ones, ones, 1, list(case.x.shape)
    )
    x = case.x.to(memory_format=torch.channels_last)

    def run() -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, case.bias, pads, ones, ones, 1, "none", [], ""
        )

    return Peer(run, run)


def torch_blocked(case: Case) -> Peer:
    if not torch.backends.mkldnn.is_available():
        raise MissingError("this torch has no oneDNN")
    ones, pads = [1, 1], [case.padding] * 2
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
        case.weight.to_mkldnn(), pads, ones, ones, 1, list(case.x.shape)
    )
    # A tensor is blocked once a convolution has made it: here one that changes nothing.
    channels = case.x.shape[1]
    identity = torch.eye(channels).view(channels, channels, 1, 1).to_mkldnn()
    bias = case.bias.to_mkldnn()
    x = torch.mkldnn_convolution(case.x.to_mkldnn(), identity, None, [0, 0], ones, ones, 1)

    def run() -> Tensor:
        return torch.mkldnn_convolution(x, weight, bias, pads, ones, ones, 1)

    return Peer(run, lambda: run().to_dense())


# oneDNN 2.x


@functools.cache
def onednn_library() -> ctypes.CDLL:
    library = compiled("onednn.cpp", "-ldnnl")
    library.onednn_create.restype = ctypes.c_void_p
    for name in ("onednn_error", "onednn_version", "onednn_implementation"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("onednn_run", "onednn_run_plain", "onednn_destroy", "onednn_implementation"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    return library


class _OneDNN:
    """A convolution of the bridge, freed with this object."""

    def __init__(self, case: Case) -> None:
        self.library, self.out = onednn_library(), torch.empty(case.out_shape)
        self.case = case  # whose tensors the bridge reads
        if (got := self.library.onednn_threads(case.threads)) != case.threads:
            raise MissingError(f"OpenMP gives {got} threads, not {case.threads}")
        pointers = (
            ctypes.c_void_p(t.data_ptr()) for t in (case.x, case.weight, case.bias, self.out)
        )
        n, c, h, w = case.x.shape
        k, r = case.weight.shape[0], case.weight.shape[2]
        self.handle = self.library.onednn_create(n, c, h, w, k, r, case.padding, *pointers)
        if not self.handle:
            raise MissingError(self.library.onednn_error().decode())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.onednn_destroy(self.handle)

    def run(self) -> None:
        self.library.onednn_run(self.handle)

    def run_plain(self) -> None:
        self.library.onednn_run_plain(self.handle)

    def result(self) -> Tensor:
        self.run_plain()
        return self.out


def onednn(case: Case, plain: bool = False) -> Peer:
    conv = _OneDNN(case)
    version = conv.library.onednn_version().decode()
    implementation = conv.library.onednn_implementation(conv.handle).decode()
    return Peer(conv.run_plain if plain else conv.run, conv.result, f"{version} {implementation}")


# ncnn


def ncnn(case: Case) -> Peer:
    ncnn = imported("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = case.threads
    net.opt.use_vulkan_compute = False
    for lower in ("bf16_storage", "fp16_storage", "fp16_packed", "fp16_arithmetic"):
        setattr(net.opt, f"use_{lower}", False)
    (k, c, r, _), (_, _, h, w) = case.weight.shape, case.x.shape
    layers = [
        f"Input x 0 1 x 0={w} 1={h} 2={c}",
        f"Convolution conv 1 1 x y 0={k} 1={r} 4={case.padding} 5=1 6={case.weight.numel()}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        param, weights = Path(folder, "net.param"), Path(folder, "net.bin")
        param.write_text("7767517\n2 2\n" + "\n".join(layers) + "\n")
        # The first word says that what follows is float32.
        data = torch.cat([torch.zeros(1), case.weight.flatten(), case.bias])
        weights.write_bytes(data.numpy().tobytes())
        if net.load_param(str(param)) or net.load_model(str(weights)):
            raise MissingError("it does not load its network")
    pack = next(p for p in (16, 8, 4, 1) if c % p == 0)
    arrays = [image.numpy() for image in case.x]
    images = []
    for array in arrays:
        image = ncnn.Mat(array)
        if pack > 1:
            packed = ncnn.Mat()
            ncnn.convert_packing(image, packed, pack)
            image = packed
        images.append(image)

    def run(keep_packed: int = 1) -> list:
        out = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("x", image)
            out.append(extractor.extract("y", keep_packed)[1])
        return out

    def result() -> Tensor:
        import numpy as np

        return torch.stack([torch.from_numpy(np.array(image)) for image in run(0)])

    return Peer(run, result, ncnn.__version__)


# OpenVINO


def openvino(case: Case) -> Peer:
    ov = imported("openvino")
    ops = imported("openvino.opset13")
    x = ops.parameter(list(case.x.shape), dtype=ov.Type.f32)
    conv = ops.convolution(
        x, ops.constant(case.weight.numpy()), [1, 1], [case.padding] * 2, [case.padding] * 2, [1, 1]
    )
    y = ops.add(conv, ops.constant(case.bias.view(1, -1, 1, 1).numpy()))
    options = {
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    model = ov.Core().compile_model(ov.Model([y], [x]), "CPU", options)
    request, out = model.create_infer_request(), torch.empty(case.out_shape)
    request.set_input_tensor(ov.Tensor(case.x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(out.numpy(), shared_memory=True))

    def result() -> Tensor:
        request.infer()
        return out

    return Peer(request.infer, result, ov.__version__.split("-")[0])


# onnxruntime


def onnxruntime(case: Case) -> Peer:
    ort, onnx = imported("onnxruntime"), imported("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[case.padding] * 4)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", kind, list(case.x.shape))],
        [helper.make_tensor_value_info("y", kind, list(case.out_shape))],
        [
            onnx.numpy_helper.from_array(case.weight.numpy(), "w"),
            onnx.numpy_helper.from_array(case.bias.numpy(), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    # Between calls, where its threads would go on spinning while others are timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    out, binding = torch.empty(case.out_shape), session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(case.x.numpy()))
    binding.bind_output("y", "cpu", 0, out.numpy().dtype, list(out.shape), out.data_ptr())

    def result() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return Peer(lambda: session.run_with_iobinding(binding), result, ort.__version__)


PEERS: dict[str, Callable[[Case], Peer]] = {
    "torch NCHW": lambda case: torch_conv(case, torch.contiguous_format),
    "torch channels_last": lambda case: torch_conv(case, torch.channels_last),
    "torch packed": torch_packed,
    "torch blocked": torch_blocked,
    "oneDNN Winograd": onednn,
    "oneDNN Winograd, NCHW": lambda case: onednn(case, plain=True),
    "ncnn": ncnn,
    "OpenVINO": openvino,
    "onnxruntime": onnxruntime,
}
