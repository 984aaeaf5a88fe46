"""Load a packed file in this process, which knows nothing else, and classify the test images.

    python -m compressops.demo.classify FILE RECIPE OUT

``OUT`` gets a safetensors file of the logits; standard output a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from compressops.compress import Recipe
from compressops.serialize import load
from compressops.train import evaluate
from compressops.zoo.registry import build_data, build_model


def main(file: Path, recipe_path: Path, out: Path) -> None:
    """Classify, and write the logits beside the accuracy."""
    recipe = Recipe.from_yaml(recipe_path)
    # The architecture alone: what is trained comes from the packed file.
    ((name, arguments),) = recipe.model.items()
    arguments = {key: value for key, value in arguments.items() if key != "checkpoint"}
    _, images = build_data(recipe.data, recipe.folder)
    began = time.perf_counter()
    model = load(file, build_model({name: arguments})).eval()
    seconds = time.perf_counter() - began
    logits: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: logits.append(output.clone()))
    accuracy = evaluate(model, images)
    save_file({"logits": torch.cat(logits)}, out)
    print(
        json.dumps(
            {
                "top1": accuracy.top1,
                "top5": accuracy.top5,
                "samples": accuracy.samples,
                "load_seconds": round(seconds, 3),
            }
        )
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
