"""deepsparse's product of a pruned weight, as a peer of `bench_bsr_linear.py`.

deepsparse 1.8 (closed, no longer maintained) needs older Python packages than torch does, so it
runs in an interpreter of its own, which ``DEEPSPARSE_PYTHON`` names:

    python3.11 -m venv deepsparse
    deepsparse/bin/pip install "deepsparse==1.8.0"

Run as a program, this file is that process. It times its calls itself and sends seconds, so the
way between the processes is not counted. While it is not asked it is stopped: its threads go on
spinning for a while after a call, and would disturb who comes next.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy


class DeepSparse:
    """x (M, K) times the transpose of weight (N, K), in a process with ``threads`` threads.

    Raises `peers.MissingError` where it does not run.
    """

    def __init__(self, x: numpy.ndarray, weight: numpy.ndarray, threads: int) -> None:
        from peers import MissingError

        python = os.environ.get("DEEPSPARSE_PYTHON")
        if not python:
            raise MissingError("DEEPSPARSE_PYTHON names no interpreter that has it")
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        numpy.savez(folder / "case.npz", x=x, weight=weight)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self._process = subprocess.Popen(
            [python, __file__, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment | {"NM_DISABLE_ANALYTICS": "True"},
        )
        if self._answer() != "ready":
            raise MissingError(f"{python} does not run deepsparse")
        self.result = numpy.load(folder / "result.npy")

    def seconds(self, min_seconds: float = 0.005) -> float:
        """Seconds a call, of as many calls as last ``min_seconds``."""
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{min_seconds}\n")
        self._process.stdin.flush()
        answer = float(self._answer())
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def _answer(self) -> str:
        """The next line that is ours: the engine prints a banner of its own."""
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        return ""


def serve(folder: Path, threads: int) -> None:
    """Build the network, then time it as often as a line asks for it."""
    import onnx
    from deepsparse import Engine
    from onnx import TensorProto, helper, numpy_helper

    with numpy.load(folder / "case.npz") as case:
        x, weight = case["x"], case["weight"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (len(x), len(weight)))],
        [numpy_helper.from_array(numpy.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    engine = Engine(str(folder / "model.onnx"), batch_size=len(x), num_cores=threads)
    numpy.save(folder / "result.npy", engine.run([x], val_inp=False)[0])
    began = time.perf_counter()
    engine.run([x], val_inp=False)
    once = time.perf_counter() - began
    print("> ready", flush=True)
    for line in sys.stdin:
        repeats = max(1, int(float(line) / max(once, 1e-7)))
        began = time.perf_counter()
        for _ in range(repeats):
            engine.run([x], val_inp=False)
        print(f"> {(time.perf_counter() - began) / repeats}", flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
