"""The command line: the words of the Python API, one line for an error, JSON on request."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

# What a command needs is imported when it runs: help and mistyped options answer at once.

app = typer.Typer(
    name="compressops",
    help="Chain-compress PyTorch networks, pack them into one file, and run that.\n\n"
    "An error is one line and exit code 2; with COMPRESSOPS_TRACEBACK=1 in the environment it is "
    "a Python traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console()

File = Annotated[Path, typer.Argument(help="A file that compressops saved.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A zoo model, as in recipes ('CifarNet', '{CifarNet: {width: 0.5}}'), or a function "
        "that makes the model: 'package.module:function' or 'file.py:function'.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Residency = Annotated[
    str, typer.Option(help="'decoded': weights are decoded once; 'packed': on each use.")
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose user errors are one line and exit code 2, without a traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            if not _is_users(error) or os.environ.get("COMPRESSOPS_TRACEBACK") == "1":
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"compressops: error: {text}", file=sys.stderr)
            raise typer.Exit(2) from None

    return app.command()(run)


def _is_users(error: Exception) -> bool:
    from compressops.backends import BackendError

    return isinstance(error, (ValueError, TypeError, OSError, ImportError, BackendError))


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import compressops

        print(compressops.__version__)
        raise typer.Exit


@command
def compress(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe that names its model and data.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to save the packed model to.")
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(help="Where checkpoints are kept; the same call goes on from them."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data order, augmentation and dropout.")] = 0,
    tensorboard: Annotated[
        Path | None, typer.Option(help="A folder for TensorBoard: losses, learning rate, accuracy.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe, and save the result packed into one file.

    Runs on many processes under `accelerate launch` or `torchrun`.
    """
    from compressops.compress import run_recipe
    from compressops.convert import convert as convert_model
    from compressops.serialize import save
    from compressops.train.memory import keep_freed_memory

    keep_freed_memory()
    workdir = workdir or Path("runs") / recipe.stem
    workdir.mkdir(parents=True, exist_ok=True)
    target = output or workdir / f"{recipe.stem}.safetensors"
    _check_folder(target)
    result = run_recipe(recipe, workdir, seed, tensorboard=tensorboard)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    size = save(convert_model(result.model), target)
    if as_json:
        rows = [dataclasses.asdict(row) for row in result.table]
        _print_json({"table": rows, "file": str(target), "file_bytes": size})
    else:
        out.print(result.table)
        out.print(f"{target}: {size:,} bytes", highlight=False)


@command
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A safetensors file of the float model's state_dict.")
    ],
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    config: Annotated[
        str,
        typer.Option(
            "--config",
            "-c",
            help="How to pack, in the words of recipes: 'Huffman', '{Int: {bits: 4}}', or a list: "
            "'[{Int: {bits: 4, group_size: 64}}, Huffman]'.",
        ),
    ] = "Huffman",
    layers: Annotated[
        str, typer.Option(help="Convert only the layers whose name matches this glob.")
    ] = "*",
    as_json: Json = False,
) -> None:
    """Pack a float model after training: quantize it, or code it without loss."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from compressops.convert import convert as convert_model
    from compressops.serialize import save

    _check_folder(output)
    choice = parse_config(config)
    float_model = make_model(model)
    try:
        float_model.load_state_dict(load_file(checkpoint))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} does not fit {model}: {error}") from error
    packed = convert_model(float_model, {layers: choice}, prefer="size")
    save(packed, output)
    _show_report(packed, output, as_json)


@command
def inspect(file: File, as_json: Json = False) -> None:
    """Show what a file holds, tensor by tensor, to the byte, without decoding anything."""
    from compressops.serialize import inspect as inspect_file

    info = inspect_file(file)
    if as_json:
        _print_json(dataclasses.asdict(info))
    else:
        print(info)


@command
def verify(file: File, as_json: Json = False) -> None:
    """Check every byte of a file, and everything that it decodes to."""
    from compressops.serialize import verify as verify_file

    found = verify_file(file)
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        print(found)


@command
def report(
    file: File,
    model: Model,
    residency: Residency = "decoded",
    html: Annotated[Path | None, typer.Option(help="Write a page of HTML here.")] = None,
    as_json: Json = False,
) -> None:
    """Load a file, and show layer by layer what it is on paper, on disk and in memory."""
    from compressops.report import report as report_model
    from compressops.serialize import load

    packed = load(file, make_model(model), residency)
    if html is not None:
        _check_folder(html)
        html.write_text(report_model(packed, file).to_html(), encoding="utf-8")
    _show_report(packed, file, as_json)


@command
def bench(
    file: File,
    model: Model,
    shape: Annotated[str, typer.Option(help="Of the float input, as in '1,3,32,32'.")],
    rounds: Annotated[int, typer.Option(min=3, help="Timed calls of each.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Json = False,
) -> None:
    """Time a file's model against the dense float one: medians of calls that take turns."""
    import torch

    from compressops.measure import median_times
    from compressops.serialize import load

    if threads is not None:
        torch.set_num_threads(threads)
    x = torch.randn(_shape(shape))
    dense = make_model(model).eval()
    models = {"dense": dense}
    for residency in ("decoded", "packed"):
        models[residency] = load(file, dense, residency).eval()
    calls = [functools.partial(m, x) for m in models.values()]
    seconds = dict(zip(models, median_times(calls, rounds), strict=True))
    if as_json:
        figures = {"seconds": seconds, "shape": list(x.shape), "rounds": rounds}
        _print_json({**figures, "threads": torch.get_num_threads()})
        return
    table = Table("model", box=None, pad_edge=False)
    for header in ("median", "against dense"):
        table.add_column(header, justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.3f} ms", f"{seconds['dense'] / value:.2f}×")
    out.print(table)
    out.print(f"{rounds} rounds, {torch.get_num_threads()} threads, input {list(x.shape)}")


def make_model(spec: str) -> nn.Module:
    """The float model of a ``--model`` option, in eval mode.

    Raises:
        ValueError: nothing of that name, or what it makes is no module.
    """
    import importlib
    import runpy

    import yaml
    from torch import nn

    from compressops.zoo.registry import build_model

    place, _, name = spec.rpartition(":")
    if not place or spec.lstrip().startswith("{"):
        try:
            return build_model(yaml.safe_load(spec))
        except yaml.YAMLError as error:
            raise ValueError(f"--model: not valid YAML: {spec!r}") from error
    if place.endswith(".py"):
        function = runpy.run_path(place).get(name)
    else:
        sys.path.insert(0, os.getcwd())  # as python -m does
        function = getattr(importlib.import_module(place), name, None)
    if not callable(function):
        raise ValueError(f"--model: {place} has no function {name!r}")
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: {spec} makes a {type(model).__name__}, not an nn.Module")
    return model.eval()


def parse_config(text: str) -> Any:
    """A ``--config`` option as what `convert` takes: axis members in the words of recipes.

    Raises:
        ValueError: not YAML, or not made of layouts, numbers and codings.
    """
    import yaml

    from compressops.formats import Coding, Layout, Number

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--config: not valid YAML: {text!r}") from error
    members = []
    for item in tree if isinstance(tree, list) else [tree]:
        named = {item: {}} if isinstance(item, str) else item
        if not isinstance(named, dict) or len(named) != 1:
            raise ValueError(f"--config: one name with its arguments is wanted, got {item!r}")
        ((name, fields),) = named.items()
        axes = {member: axis for axis in (Layout, Number, Coding) for member in axis.members}
        if name not in axes:
            raise ValueError(f"--config: unknown {name!r}; known are {', '.join(sorted(axes))}")
        members.append(axes[name].from_spec({**(fields or {}), "type": name}))
    return tuple(members)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--shape must be positive integers with commas between, got {text!r}")
    return shape


def _check_folder(target: Path) -> None:
    """Fail before the work, not after it."""
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist")


def _show_report(model: nn.Module, file: Path, as_json: bool) -> None:
    from compressops.report import report as report_model

    found = report_model(model, file)
    if as_json:
        _print_json(found.to_dict())
    else:
        out.print(found)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


if __name__ == "__main__":
    app()
