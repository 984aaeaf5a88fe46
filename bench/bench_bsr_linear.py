"""bsr_linear and bsr_int8_linear against dense and block-sparse products of other libraries.

    python bench/bench_bsr_linear.py
    python bench/bench_bsr_linear.py --sizes 4096 --m 64 --blocks 16 --merge
    python bench/gpu_verify.py --ops bsr_linear bsr_linear_grad_x bsr_linear_grad_values \\
        bsr_int8_linear --max-seconds 600      # on a GPU: parity, checkers, figures (bsr_gpu.py)

η is density × dense time / ours, with the faster of torch's dense products (`F.linear`, and on
weights that MKL packed): what of the dense efficiency is left. "break-even" is the density at which
ours would take as long. Peers: torch's BSR, SciPy's at one row, where it is installed (one thread),
and deepsparse where `deepsparse_peer.py` finds one. "GB/s of blocks" are stored bytes a second, and
"of read GB/s" their part of what this machine reads of as many bytes, which only one row can reach;
"µs of no block" is a call of the same shape without any, and "less that" the part without it.
"""

from __future__ import annotations

import statistics

import torch
from common import interleaved, median_ratio, merged, parser, report
from deepsparse_peer import DeepSparse
from linear_peers import FLOAT, Case
from peers import MissingError, fma_peak, imported, read_bandwidth

import compressops as co

DENSE = tuple(FLOAT)


def contestants(
    M: int, size: int, block: int, density: float, threads: int
) -> tuple[dict, dict, int]:
    """What is called and who times himself (`interleaved`), and the weights that are stored."""
    grid = -(-size // block)
    keep = torch.rand(grid, grid) < density
    mask = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:size, :size]
    weight = torch.randn(size, size) * mask
    x = torch.randn(M, size)
    plain = co.ops.bsr_from_dense(weight, (block, block))
    packed = co.ops.bsr_linear_pack(*plain, size, size)
    codes = (plain[0] * (127 / 6)).round().clamp(-127, 127).to(torch.int8)
    *int8, sums = co.ops.bsr_int8_linear_pack(codes, *plain[1:], size, size)
    scales = torch.full((size,), 6 / 127)
    calls = {
        "ours": lambda: co.ops.bsr_linear(x, *packed, size),
        "ours int8": lambda: co.ops.bsr_int8_linear(x, *int8, scales, sums),
    }
    for name, make in FLOAT.items():
        try:
            calls[name] = make(Case(x, weight, threads)).run
        except MissingError as why:
            print(f"{name}: {why}")
    if size % block == 0:
        values, crow, col = plain
        theirs = torch.sparse_bsr_tensor(crow.long(), col.long(), values, (size, size))
        calls["torch BSR"] = lambda: theirs @ x.t()
    if M == 1:
        hollow = co.ops.bsr_from_dense(weight, (block, block), torch.zeros_like(keep))
        empty = co.ops.bsr_linear_pack(*hollow, size, size)
        calls["no block"] = lambda: co.ops.bsr_linear(x, *empty, size)
    try:
        if M == 1 and size % block == 0:
            scipy = imported("scipy.sparse")
            values, crow, col = (tensor.numpy() for tensor in plain)
            bsr, rows = scipy.bsr_matrix((values, col, crow), (size, size)), x.t().numpy()
            calls["SciPy BSR"] = lambda: bsr @ rows
    except MissingError as why:
        print(f"SciPy: {why}")
    remote = {}
    try:
        remote["deepsparse"] = DeepSparse(x.numpy(), weight.numpy(), threads)
    except MissingError as why:
        print(f"deepsparse: {why}")
    expected = x[:4] @ weight.t()
    error = (calls["ours"]()[:4] - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < 1e-4, error
    for peer in remote.values():
        error = (torch.from_numpy(peer.result[:4]) - expected).norm() / expected.norm().clamp(1e-9)
        assert error < 1e-4, error
    return calls, remote, plain[0].numel()


@torch.no_grad()
def main() -> None:
    out = parser(__doc__, "bsr_linear-cpu")
    out.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    out.add_argument("--m", type=int, nargs="+", default=[1, 64, 128, 256, 1024])
    out.add_argument("--blocks", type=int, nargs="+", default=[16, 32])
    out.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2])
    out.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = out.parse_args()
    smoke = arguments.smoke
    rows = []
    torch.manual_seed(0)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        peak = 0.0 if smoke else fma_peak(threads)
        for size in [64] if smoke else arguments.sizes:
            for block in [16] if smoke else arguments.blocks:
                for density in [0.3] if smoke else arguments.densities:
                    for M in [2] if smoke else arguments.m:
                        calls, remote, stored = contestants(M, size, block, density, threads)
                        times = interleaved(
                            calls,
                            2 if smoke else max(15, arguments.rounds),
                            remote={name: peer.seconds for name, peer in remote.items()},
                        )
                        for peer in remote.values():
                            peer.close()
                        bandwidth = read_bandwidth(threads, 4 * stored) if M == 1 else None
                        rows.append(
                            row(times, M, size, block, threads, density, stored, bandwidth, peak)
                        )
    rows = merged(rows, arguments, ("size", "block", "density", "M", "threads"))
    report("bsr_linear (CPU), × = times faster than the peer", rows, arguments)


def row(
    times: dict[str, list[float]],
    M: int,
    size: int,
    block: int,
    threads: int,
    asked: float,
    stored: int,
    bandwidth: float | None,
    peak: float,
) -> dict:
    """The columns of one shape."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    dense = min((name for name in DENSE if name in medians), key=medians.get)
    density = stored / size**2
    found = {
        **{"size": size, "block": block, "density": asked, "M": M, "threads": threads},
        "ours µs": medians["ours"] * 1e6,
        "GFLOP/s": 2 * M * stored / medians["ours"] / 1e9,
        "× dense": median_ratio(times[dense], times["ours"]),
    }
    found["η"] = density * found["× dense"]
    found["break-even"] = min(1.0, found["η"])
    for name in ("torch BSR", "SciPy BSR", "deepsparse"):
        found[f"× {name}"] = median_ratio(times[name], times["ours"]) if name in times else None
    found["int8 × fp32 blocks"] = median_ratio(times["ours"], times["ours int8"])
    found["GB/s of blocks"] = speed = 4 * stored / medians["ours"] / 1e9
    found["of read GB/s"] = speed / bandwidth if bandwidth else None
    call = medians.get("no block")
    found["µs of no block"] = call * 1e6 if call else None
    rest = 4 * stored / (medians["ours"] - call) / 1e9 if call else None
    found["less that"] = rest / bandwidth if call and bandwidth else None
    return found | {"FMA peak GFLOP/s": peak}


if __name__ == "__main__":
    main()
