"""Train the CifarNet baseline on CIFAR-10: the checkpoint that the recipes start from.

    python recipes/train_cifarnet.py --out build/cifarnet

Made for few cores: images grow from 20×20 to 32×32 pixels as the training goes on, and the
convolutions are updated by Muon (Jordan 2024), which needs fewer epochs than SGD. It writes a
checkpoint after every epoch and resumes from it.

The shipped checkpoint took 16 epochs on two cores; its log, cifarnet.log.jsonl, shows that the run
was resumed twice with other --sizes, which moved the linear decay of the learning rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from compressops.train.memory import keep_freed_memory
from compressops.zoo import cifar10
from compressops.zoo.cifarnet import CifarNet
from compressops.zoo.images import resize, shift_and_flip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/cifarnet"))
    parser.add_argument("--data", type=Path, default=None, help="folder of the CIFAR-10 batches")
    parser.add_argument("--sizes", default="20*4,24*6,28*4,32*2", help="image size × epochs")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.1, help="Muon's, relative to the weight norm")
    parser.add_argument("--momentum", type=float, default=0.85)
    parser.add_argument("--sgd-lr", type=float, default=0.05, help="of batch norms and classifier")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of the classifier")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0, help="0.5 wants > 100 epochs")
    parser.add_argument("--cutout", type=float, default=0.0, help="side, as a part of the image's")
    parser.add_argument("--warmup", type=float, default=0.05, help="part of all steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def resized_to(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 ``[N, 3, 32, 32]`` to normalised float ``[N, 3, size, size]``."""
    return torch.cat([resize(cifar10.normalize(part), size) for part in images.split(5000)])


def augment(
    images: torch.Tensor, generator: torch.Generator, flip: torch.Tensor, cutout: float
) -> torch.Tensor:
    """Random translation by up to an eighth (reflected), flips as given, and cutout."""
    n, _, size, _ = images.shape
    positions = 2 * (size // 8) + 1
    top, left = (torch.randint(0, positions, (n, 1), generator=generator) for _ in range(2))
    out = shift_and_flip(images, top, left, flip)
    if cutout:
        side = round(size * cutout)
        steps = torch.arange(size)
        y, x = (torch.randint(0, size, (n, 1), generator=generator) for _ in range(2))
        hit_y = (steps - y).abs() * 2 < side
        hit_x = (steps - x).abs() * 2 < side
        out = out.masked_fill((hit_y[:, :, None] & hit_x[:, None, :])[:, None], 0.0)
    return out.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent."""
    model.eval()
    batches = cifar10.normalize(images).contiguous(memory_format=torch.channels_last).split(500)
    ranks = torch.cat([model(batch).topk(5).indices for batch in batches])
    hits = ranks == labels[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    data = cifar10.load(args.data)
    sizes = [
        int(s)
        for part in args.sizes.split(",")
        for s in [part.split("*")[0]] * int(part.split("*")[1])
    ]

    model = CifarNet(dropout=args.dropout)
    convs = [m.weight for m in model.features.modules() if isinstance(m, torch.nn.Conv2d)]
    # Muon is defined on matrices: [out, in·kh·kw] views of the filters share their memory.
    matrices = [torch.nn.Parameter(w.detach().view(len(w), -1)) for w in convs]
    conv_ids = {id(w) for w in convs}
    others = [p for p in model.parameters() if id(p) not in conv_ids]
    muon = torch.optim.Muon(
        matrices, lr=args.lr, momentum=args.momentum, nesterov=True, weight_decay=0.0
    )
    sgd = torch.optim.SGD(
        others, lr=args.sgd_lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    steps_per_epoch = len(data.train_images) // args.batch_size
    total = steps_per_epoch * len(sizes)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / max(1.0, args.warmup * total)) * max(0.0, 1 - step / total)

    start = 0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        sgd.load_state_dict(state["sgd"])
        start = state["epoch"]
    log = (args.out / "log.jsonl").open("a")
    print(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}}), file=log, flush=True)

    resized: tuple[int, torch.Tensor] = (0, torch.empty(0))
    first_flip = torch.rand(50000, generator=torch.Generator().manual_seed(args.seed)) < 0.5
    for epoch in range(start, len(sizes)):
        began = time.time()
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        if resized[0] != sizes[epoch]:
            resized = (sizes[epoch], resized_to(data.train_images, sizes[epoch]))
        # Alternating flips (Jordan 2024): every pair of epochs sees each image both ways.
        flip = first_flip ^ bool(epoch % 2)
        order = torch.randperm(len(data.train_images), generator=generator)
        model.train()
        losses = []
        for i in range(steps_per_epoch):
            picked = order[i * args.batch_size : (i + 1) * args.batch_size]
            x = augment(resized[1][picked], generator, flip[picked], args.cutout)
            loss = F.cross_entropy(
                model(x), data.train_labels[picked], label_smoothing=args.label_smoothing
            )
            model.zero_grad(set_to_none=True)
            loss.backward()
            factor = schedule(epoch * steps_per_epoch + i)
            for optimizer, lr in ((muon, args.lr), (sgd, args.sgd_lr)):
                optimizer.param_groups[0]["lr"] = lr * factor
            with torch.no_grad():
                for matrix, conv in zip(matrices, convs, strict=True):
                    matrix.grad = conv.grad.reshape(matrix.shape)
                    # Batch norm makes the filters' scale free; a fixed norm makes lr relative.
                    matrix.mul_(math.sqrt(len(matrix)) / matrix.norm())
            muon.step()
            sgd.step()
            losses.append(loss.item())
        top1, top5 = evaluate(model, data.test_images, data.test_labels)
        row = {
            "epoch": epoch + 1,
            "size": sizes[epoch],
            "loss": round(sum(losses) / len(losses), 4),
            "top1": round(top1, 2),
            "top5": round(top5, 2),
            "seconds": round(time.time() - began, 1),
        }
        print(json.dumps(row), flush=True)
        print(json.dumps(row), file=log, flush=True)
        state = {
            "model": model.state_dict(),
            "muon": muon.state_dict(),
            "sgd": sgd.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, args.out / "cifarnet.safetensors")


if __name__ == "__main__":
    main()
