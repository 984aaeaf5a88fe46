"""The convolutions of VGG16 factorized, and distilled from themselves: how far the error falls.

    python bench/lowrank_vgg16.py --workdir RUNS

`compressops/zoo/vgg16.py` says what to install. The forms share half of the multiply-accumulates
out over the layers; factors of these ranks are fitted to the weights, and to the outputs on crops
of three photographs ("calibrated"). Of the form ``--form`` these are then trained, without labels,
for what the float network gives after each of its five groups of layers (mean squared differences,
each over the mean square), on crops of photographs and on images of CIFAR-10, side by side,
128×128. Untrained, it is measured at other budgets, too.

Errors are of eight other photographs at 224×224, those of `bench_lowrank.py`: relative to the last
output's norm, and of the five groups; "perceptual" is the mean squared difference of their features
of unit length (Zhang et al. 2018, arXiv 1801.03924, without the learned weights), summed over the
five. A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import copy
import statistics
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_lowrank import CALIBRATION, HELD_OUT, factorized, multiply_accumulates
from common import merged, parser, write
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import compressops as co
from compressops.train.memory import keep_freed_memory
from compressops.zoo import cifar10, vgg16

# The last ReLU of each group.
GROUPS = ("3", "8", "15", "22", "29")
SIZE = 128
PHOTOGRAPHS = (
    *("china.jpg", "flower.jpg", "chelsea.png", "coffee.png", "motorcycle_left.png"),
    *("china.jpg", "flower.jpg", "retina.jpg", "camera.png", "hubble_deep_field.jpg"),
)


def small_images(count: int, generator: torch.Generator) -> Tensor:
    """Of CIFAR-10, four enlarged or sixteen side by side, normalised ``[count, 3, 128, 128]``."""
    images, found = cifar10.load().train_images, []
    for index in range(count):
        side = 64 if index % 2 else 32
        n = SIZE // side
        chosen = images[torch.randint(len(images), (n * n,), generator=generator)].float() / 255
        chosen = F.interpolate(chosen, size=side, mode="bicubic").clamp(0, 1)
        tiles = chosen.view(n, n, 3, side, side).permute(2, 0, 3, 1, 4)
        found.append(tiles.reshape(1, 3, SIZE, SIZE))
    return vgg16.normalised(torch.cat(found))


def training_images(photographs: int, others: int) -> TensorDataset:
    """The quarters of crops of twice the size, which show things as large as where errors are
    measured, and small images."""
    crops = vgg16.crops(PHOTOGRAPHS, photographs // 4, 2 * SIZE, seed=3)
    quarters = crops.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE).permute(0, 2, 3, 1, 4, 5)
    images = [
        quarters.reshape(-1, 3, SIZE, SIZE),
        small_images(others, torch.Generator().manual_seed(3)),
    ]
    count = sum(map(len, images))
    return TensorDataset(torch.cat(images), torch.zeros(count, dtype=torch.int64))


def measured(dense: nn.Sequential, ours: nn.Sequential, x: Tensor) -> dict:
    layers, groups, distance, theirs, mine = [], [], 0.0, x, x
    for name, module in dense.named_children():
        other, after = ours.get_submodule(name), module(theirs.clone())
        if isinstance(module, nn.Conv2d):
            layers.append(relative(other(theirs), after))
        theirs, mine = after, other(mine.clone())
        if name in GROUPS:
            groups.append(relative(mine, theirs))
            apart = F.normalize(mine, dim=1) - F.normalize(theirs, dim=1)
            distance += apart.square().sum(1).mean().item()
    return {
        "× fewer MACs": multiply_accumulates(dense, x) / multiply_accumulates(ours, x),
        "output error": groups[-1],
        "output error squared": groups[-1] ** 2,
        "groups": groups,
        "layer error": statistics.mean(error**2 for error in layers) ** 0.5,
        "perceptual": distance,
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def retrain(scales: list[float], steps: int, lr: float, arguments: Namespace) -> co.Retrain:
    return co.Retrain(
        steps=steps,
        batch_size=arguments.batch_size,
        optimizer=arguments.optimizer,
        lr=lr,
        schedule=arguments.schedule,
        warmup=0.1,
        ce_weight=0.0,
        convolutions="winograd",
        checkpoint_seconds=120.0,
        distill=tuple(
            co.ActivationKD(name, weight=1 / scale)
            for name, scale in zip(GROUPS, scales, strict=True)
        ),
    )


def main() -> None:
    out = parser(__doc__, "lowrank_vgg16")
    out.add_argument("--forms", nargs="+", default=["matrix", "spatial", "auto"])
    out.add_argument("--form", default="spatial", help="one of them, to train")
    out.add_argument("--macs", type=float, default=0.5)
    out.add_argument("--budgets", type=float, nargs="*", default=[0.9, 0.8, 0.7, 0.6])
    out.add_argument("--calibration", type=int, default=24, help="crops of 224×224")
    out.add_argument("--photographs", type=int, default=1600, help="crops of 128×128")
    out.add_argument("--others", type=int, default=800, help="images of CIFAR-10")
    out.add_argument("--steps", type=int, nargs="*", default=[300], help="of each --lr, in turn")
    out.add_argument("--batch-size", type=int, default=4)
    out.add_argument("--optimizer", default="adamw")
    out.add_argument("--lr", type=float, nargs="*", default=[5e-5])
    out.add_argument("--schedule", default="cosine", help="of each --lr, from its warmup to 0")
    out.add_argument("--merge", action="store_true", help="keep the rows that the file has")
    out.add_argument("--workdir", type=Path, required=True)
    arguments = out.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads[0])
    dense, held = vgg16.load(), vgg16.crops(HELD_OUT, 16, seed=2)
    crops = vgg16.crops(CALIBRATION, arguments.calibration, seed=1).split(4)
    rows, cut = [], {}

    def note(row: dict, model: nn.Sequential) -> None:
        with torch.no_grad():
            rows.append(row | measured(dense, model, held))
        print(rows[-1], flush=True)
        write("VGG16 factorized and trained", merged(rows, arguments, tuple(row)), arguments)

    for macs in arguments.budgets:
        model, _ = factorized(dense, arguments.form, macs, crops, arguments.workdir)
        note({"form": arguments.form, "budget": macs, "calibrated": True, "steps": 0}, model)
    for form in arguments.forms:
        cut[form], stage = factorized(dense, form, arguments.macs, crops, arguments.workdir)
        plain = copy.deepcopy(dense)
        stage.attach(plain)  # the same ranks, and no data
        for fitted, model in ((False, plain), (True, cut[form])):
            row = {"form": form, "budget": arguments.macs, "calibrated": fitted, "steps": 0}
            note(row, model)
    if not arguments.steps:
        return
    data, model = training_images(arguments.photographs, arguments.others), cut[arguments.form]
    row = {"form": arguments.form, "budget": arguments.macs, "calibrated": True}
    with torch.no_grad():
        x, scales = data.tensors[0][::100], []
        for name, module in dense.named_children():
            x = module(x)
            if name in GROUPS:
                scales.append(x.square().mean().item())
    stages: list[co.Retrain] = []
    for steps, lr in zip(arguments.steps, arguments.lr, strict=True):
        stages.append(retrain(scales, steps, lr, arguments))
        run = co.compress(model, co.Recipe(stages), data, teacher=dense, workdir=arguments.workdir)
        how = {"steps": sum(stage.steps for stage in stages), "optimizer": arguments.optimizer}
        note(row | how | {"lr": lr}, run.model)


if __name__ == "__main__":
    main()
