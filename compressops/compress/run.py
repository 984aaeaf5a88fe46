"""`compress`: run a recipe on a model, stage by stage, and be able to go on after a kill."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from compressops.compress.activations import InputQuantizer
from compressops.compress.identity import data_key, hash_json, model_key
from compressops.compress.lowrank import Factorize
from compressops.compress.prune import Prune
from compressops.compress.quantize import Refit
from compressops.compress.recipe import Recipe, stage_fields
from compressops.compress.retrain import Retrain
from compressops.compress.sharding import check_whole
from compressops.compress.sizes import sizes
from compressops.compress.stage import Stage
from compressops.compress.table import Row, Table
from compressops.compress.teacher import cached_logits, check_constant
from compressops.measure import call
from compressops.train import checkpoint as checkpoints
from compressops.train import data
from compressops.train.evaluate import evaluate
from compressops.train.launch import make_accelerator
from compressops.train.loop import plan_of, train
from compressops.train.sharding import is_sharded
from compressops.train.tensorboard import Curves
from compressops.train.tensorboard import check as check_tensorboard


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: the compressed model, in eval mode: still floats, its parametrizations the record
            of what was done. The model that was given is untouched.
        table: a row per stage, row 0 the model as it was given.
        history: per stage, the epochs of its `Retrain` (empty for other stages).
    """

    model: nn.Module
    table: Table
    history: list[list[dict[str, float]]]


def compress(
    model: nn.Module,
    recipe: Recipe,
    train_data: Any = None,
    eval_data: Any = None,
    teacher: nn.Module | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
    log: Console | bool = True,
    accelerator: Any = None,
    tensorboard: str | Path | None = None,
) -> Result:
    """Run ``recipe`` on a copy of ``model``.

    Args:
        model: a trained network.
        train_data, eval_data: map-style data sets of ``(inputs, labels)``; training data is
            needed by `Retrain` only, and without evaluation data the table has no accuracies.
        teacher: for `Retrain`'s ``distill``; may be ``model`` itself.
        workdir: where checkpoints are kept. The same call goes on where a killed one stopped, and
            recipes that begin with the same stages (on the same model, data and seed) share them.
            A data set with a ``fingerprint`` is told from others by that, tensors by their bytes,
            and any other by its length and up to 32 of its items.
        seed: of the order of the data, its augmentation and dropout.
        log: a rich console, ``True`` for standard error, ``False`` for silence.
        accelerator: an `accelerate.Accelerator` of your own; otherwise one is made if the recipe
            retrains. Under ``accelerate launch`` or ``torchrun`` every process calls `compress`.
        tensorboard: folder for TensorBoard's event files: a run ``stages`` with accuracy and bytes
            after each stage, and one for each `Retrain` with its losses by name and learning rate.

    Raises:
        ValueError: the recipe does not fit the model or the data; raised before any work.
        ImportError: ``tensorboard`` without the package of that name.
    """
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    recipe.validate(model, train_data=train_data, eval_data=eval_data, teacher=teacher)
    for name, dataset in (("train_data", train_data), ("eval_data", eval_data)):
        if dataset is not None:
            data.check_dataset(name, dataset)
    retrains = [stage for stage in recipe.stages if isinstance(stage, Retrain)]
    if accelerator is None and retrains:
        accelerator = make_accelerator(retrains[0].mixed_precision)
    for i, stage in enumerate(recipe.stages, 1):
        if isinstance(stage, Retrain):
            try:
                plan_of(stage, train_data, accelerator, seed)
                if is_sharded(accelerator):
                    check_whole(model, recipe.stages[: i - 1])
                if stage.cache_teacher:
                    check_constant("cache_teacher", train_data)
            except (TypeError, ValueError) as error:
                raise type(error)(f"stage {i} (Retrain): {error}") from None
    console = log if isinstance(log, Console) else Console(stderr=True) if log else None
    if accelerator is not None and not accelerator.is_main_process:
        console = None
    run = _Run(
        copy.deepcopy(model).eval(),
        recipe.stages,
        train_data,
        eval_data,
        # The teacher may be the model itself, and is moved and switched to eval mode.
        copy.deepcopy(teacher) if teacher is not None else None,
        Path(workdir) if workdir is not None else None,
        seed,
        console,
        accelerator,
        None if tensorboard is None else Path(tensorboard),
    )
    return run.all()


def run_recipe(
    path: str | Path,
    workdir: str | Path,
    seed: int = 0,
    log: Console | bool = True,
    tensorboard: str | Path | None = None,
) -> Result:
    """Run a recipe file on the model and the data that it names.

    The checkpoints go to ``workdir``, which several recipes may share, and the table to
    ``workdir/<name of the recipe>.json``. Running it again goes on where it stopped, or returns
    what was finished.
    """
    recipe = Recipe.from_yaml(Path(path))
    model, train_data, eval_data, teacher = recipe.load()
    result = compress(
        model, recipe, train_data, eval_data, teacher, workdir, seed, log, tensorboard=tensorboard
    )
    if int(os.environ.get("RANK", 0)) == 0:
        Path(workdir, f"{Path(path).stem}.json").write_text(result.table.to_json() + "\n")
    return result


class _Run:
    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        train_data: Any,
        eval_data: Any,
        teacher: nn.Module | None,
        workdir: Path | None,
        seed: int,
        console: Console | None,
        accelerator: Any,
        tensorboard: Path | None,
    ) -> None:
        self.model, self.stages, self.seed = model, stages, seed
        self.train_data, self.eval_data, self.teacher = train_data, eval_data, teacher
        self.workdir, self.console, self.accelerator = workdir, console, accelerator
        self.tensorboard = tensorboard
        self.rows: list[Row] = []
        # What `Factorize` found, by the stage's number, so that a restored model has its shapes.
        self.ranks: dict[str, Any] = {}
        self.history: list[list[dict[str, float]]] = []
        # Only checkpoints need names; reading data for them takes its time.
        self.keys = self.identities() if workdir is not None else []

    def identities(self) -> list[str]:
        """A key for the state after each number of stages: a hash of all that it depends on."""
        known = {}
        for name in ("train_data", "eval_data"):
            known[name], note = data_key(getattr(self, name))
            if note and self.console is not None:
                self.console.print(f"{name}: {note}", soft_wrap=True)
        keys = [hash_json({"model": model_key(self.model), **known, "seed": self.seed})]
        for stage in self.stages:
            step = [keys[-1], type(stage).__name__, stage.version, stage_fields(stage)]
            if isinstance(stage, Retrain):
                # The launcher may have chosen it, not the recipe.
                step.append(self.accelerator.mixed_precision)
                if stage.distill:
                    step.append(model_key(self.teacher))
            keys.append(hash_json(step))
        return keys

    def path(self, number: int, kind: str = "") -> Path | None:
        if self.workdir is None:
            return None
        return self.workdir / f"stage-{number:02d}-{self.keys[number]}{kind}.pt"

    def all(self) -> Result:
        device = next((p.device for p in self.model.parameters()), None)
        if self.accelerator is not None:
            self.model.to(self.accelerator.device)
        done = self.restore()
        self.draw()
        if done < 0:
            self.finish(0, "as given", time.monotonic(), None)
            done = 0
        for number in range(done + 1, len(self.stages) + 1):
            self.stage(number)
        if device is not None:
            self.model.to(device)
        table = Table(self.rows)
        if self.console is not None:
            # A log has no width to fit into.
            self.console.print(
                table if self.console.is_terminal else str(table), soft_wrap=True, highlight=False
            )
        return Result(self.model.eval(), table, self.history)

    def stage(self, number: int) -> None:
        stage = self.stages[number - 1]
        began = time.monotonic()
        if isinstance(stage, Retrain):
            self.history.append(self.retrain(number, stage))
            # What ran before a resume counts too.
            began = time.monotonic() - self.history[-1][-1]["seconds"]
        elif isinstance(stage, Factorize):
            found = stage.apply(self.model, self.batches(stage.calibration))
            self.ranks[str(number)] = stage_fields(found)["ranks"]
            self.history.append([])
        else:
            stage.attach(self.model)
            if stage.observes:
                self.calibrate(stage.observes)
            self.history.append([])
        self.finish(number, stage.label, began, self.rows[-1] if stage.lossless else None)

    def retrain(self, number: int, stage: Retrain) -> list[dict[str, float]]:
        previous = self.stages[number - 2] if number > 1 else None
        controllers = [Refit()]
        if isinstance(previous, Prune) and (schedule := previous.controller()) is not None:
            controllers.insert(0, schedule)
        return train(
            self.model,
            self.train_data,
            stage,
            accelerator=self.accelerator,
            teacher=self.teacher,
            teacher_logits=self.logits() if stage.cache_teacher else None,
            controllers=controllers,
            seed=data.mix(self.seed, number),
            checkpoint=self.path(number, ".partial"),
            console=self.console,
            title=f"stage {number}/{len(self.stages)} Retrain",
            tensorboard=self.tensorboard and self.tensorboard / f"stage-{number:02d}-Retrain",
        )

    def logits(self) -> torch.Tensor:
        """The teacher's, which one process computes where there is a folder to share them."""
        arguments = self.teacher, self.train_data, self.workdir
        if self.workdir is not None and not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return cached_logits(*arguments)
        found = cached_logits(*arguments, device=self.accelerator.device)
        if self.workdir is not None:
            self.accelerator.wait_for_everyone()
        return found

    @torch.no_grad()
    def calibrate(self, count: int) -> None:
        """Let every new input quantizer see some batches of training data."""
        quantizers = [m for m in self.model.modules() if isinstance(m, InputQuantizer)]
        for quantizer in quantizers:
            quantizer.train()
        for batch in self.batches(count):
            call(self.model, batch)
        self.model.eval()

    def batches(self, count: int) -> Iterator[Any]:
        """Arguments of the model: ``count`` batches of training data, in an order of the seed."""
        if not count:
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.train_data), generator=generator).tolist()
        parts = [order[i * 128 : (i + 1) * 128] for i in range(count)]
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(0, self.seed)
        device = next(self.model.parameters()).device
        for batch in data.loader(self.train_data, [part for part in parts if part]):
            args, kwargs, _ = data.split_batch(data.to_device(batch, device))
            yield kwargs or args

    def finish(self, number: int, name: str, began: float, same_as: Row | None) -> None:
        """Measure the model, add its row and keep its state."""
        top1 = top5 = None
        if same_as is not None:
            top1, top5 = same_as.top1, same_as.top5
        elif self.eval_data is not None:
            accuracy = evaluate(
                self.model,
                self.eval_data,
                accelerator=self.accelerator,
                console=self.console,
                title=f"stage {number}/{len(self.stages)} evaluate",
            )
            top1, top5 = accuracy.top1, accuracy.top5
        measured = sizes(self.model)
        self.rows.append(
            Row(name, top1, top5, seconds=round(time.monotonic() - began, 1), **asdict(measured))
        )
        if self.console is not None:
            self.console.print(f"stage {number}/{len(self.stages)} {self.rows[-1]}", soft_wrap=True)
        self.keep(number)
        self.draw()

    def draw(self) -> None:
        """The rows so far, for TensorBoard."""
        main = self.accelerator is None or self.accelerator.is_main_process
        if self.tensorboard is None or not main:
            return
        curves = Curves(self.tensorboard / "stages", done=-1)
        for number, row in enumerate(self.rows):
            values = {"accuracy/top1": row.top1, "accuracy/top5": row.top5}
            values["stored_bytes"] = row.stored_bytes
            curves.write(number, {n: v for n, v in values.items() if v is not None})
        curves.close()

    def keep(self, number: int) -> None:
        path = self.path(number)
        if path is not None and (self.accelerator is None or self.accelerator.is_main_process):
            checkpoints.save(
                path,
                {
                    "stages": [str(stage) for stage in self.stages[:number]],
                    "rows": [asdict(row) for row in self.rows],
                    "history": self.history,
                    "ranks": self.ranks,
                    "model": self.model.state_dict(),
                },
            )
            self.path(number, ".partial").unlink(missing_ok=True)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def restore(self) -> int:
        """Go to the last stage that is kept; its number, −1 if there is none."""
        if self.workdir is None:
            return -1
        if self.accelerator is None or self.accelerator.is_main_process:
            for number in range(len(self.keys)):
                checkpoints.remove_stale(self.path(number))
        kept = [n for n in range(len(self.stages) + 1) if self.path(n).exists()]
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        if not kept:
            self.explain(0)
            return -1
        done = kept[-1]
        state = checkpoints.load(self.path(done))
        self.ranks = state["ranks"]
        for number, stage in enumerate(self.stages[:done], 1):
            if str(number) in self.ranks:
                stage = Factorize(
                    ranks=self.ranks[str(number)], layers=stage.layers, exclude=stage.exclude
                )
            stage.attach(self.model)
        self.model.load_state_dict(state["model"])
        self.rows = [Row(**row) for row in state["rows"]]
        self.history = state["history"]
        if self.console is not None and done:
            self.console.print(f"stages 1 to {done} are taken from {self.workdir}", soft_wrap=True)
        self.explain(done)
        return done

    def explain(self, done: int) -> None:
        """Say how the next stage differs from what the folder holds, if it holds others."""
        if self.console is None or done == len(self.stages):
            return
        following = sorted(self.workdir.glob(f"stage-{done + 1:02d}-*.pt"))
        others = [p for p in following if p.name.split(".")[0] != self.path(done + 1).stem]
        if done == 0 and others and not self.path(0).exists():
            self.console.print(
                f"{self.workdir} holds runs of another model, data set or seed: starting anew"
            )
            return
        before = [str(stage) for stage in self.stages[:done]]
        for path in others:
            if path.suffixes != [".pt"]:
                continue
            try:
                found = checkpoints.load(path)["stages"]
            except ValueError:
                # It is not needed, only talked about.
                continue
            if found[:done] == before:
                self.console.print(
                    f"stage {done + 1} is {self.stages[done]}; {self.workdir} also holds "
                    f"{found[done]}, which is kept"
                )
