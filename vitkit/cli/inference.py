"""`vitkit embed`, `predict`, `eval` and `export`: what a saved model is used for."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkit.errors import UsageError, VitkitError

if TYPE_CHECKING:
    from vitkit.models.model import Model

PLAIN_SECONDS = 30.0
"""How often a line is printed where there is no terminal."""
PIPE_WIDTH = 240
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a directory that a run saved into, or a Hub repository OWNER/NAME")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="where to compute")]
Precision = Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where the hardware has it")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a file of that name")]


def embed(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="a folder, a dataset's name, or picture files")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the .safetensors file to write")],
    split: Annotated[Literal["train", "test"], typer.Option(help="which split of a dataset")] = "test",
    batch_size: Annotated[int, typer.Option(help="images encoded at a time")] = 256,
    device: Device = "auto",
    precision: Precision = "fp32",
    overwrite: Overwrite = False,
) -> None:
    """Write the features of many images into a safetensors file.

    It holds `features` float32 (n d), `labels` where they are known, and the files' names in its metadata. A picture that
    cannot be read is named and left out. After a stop the same command goes on where it was.
    """
    from vitkit.models.embed import embed as write
    from vitkit.models.image_sources import find_source

    source = find_source(images, split=split)
    loaded, resolved = _load(model, device, precision)
    try:
        with _counting(len(source), "images") as count:
            done = write(
                loaded, source, output, model_name=model, batch_size=batch_size, precision=resolved,
                overwrite=overwrite, progress=count,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print(f"stopped; the same command goes on from what {output}.partial holds", markup=False)
        raise
    if done.resumed:
        err.print(f"{done.resumed:,} images had been embedded before")
    _name_left_out(done.skipped)
    out.print(f"{done.path}: features of {done.count:,} images, {done.width} numbers each", markup=False)


def predict(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE ...", help="picture files, or folders of them")],
    top: Annotated[int, typer.Option(help="how many labels of each image")] = 3,
    label: Annotated[list[str] | None, typer.Option(help="a text to compare with, for models of images and texts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, with all labels, for programs")] = False,
    batch_size: Annotated[int, typer.Option(help="images looked at at a time")] = 64,
    device: Device = "auto",
) -> None:
    """Say what pictures show: classes with probabilities, or the nearest labels with their cosine.

    A picture that cannot be read is named and left out; the exit code is then 1.
    """
    from vitkit.models.image_sources import Files, find_source
    from vitkit.models.predict import predict as ask

    source = find_source(images)
    if not isinstance(source, Files):
        raise UsageError(f"{images[0]!r} is a dataset; predict takes pictures, `vitkit eval` measures on datasets")
    loaded, _ = _load(model, device, "fp32")
    place = next((parameter.device for parameter in loaded.parameters()), "cpu")
    found: dict[int, Any] = {}
    problems: dict[int, str] = {}
    for batch in source.batches(loaded, range(0, len(source), batch_size), batch_size):
        problems |= batch.problems
        if batch.images is not None:
            predictions = ask(loaded, batch.images.to(place), labels=label, top=None if as_json else top)
            found |= dict(zip(batch.rows, predictions, strict=True))
    if as_json:
        rows = [
            {"image": source.name(index)} | (asdict(found[index]) if index in found else {"error": problems[index]})
            for index in range(len(source))
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False))
    else:
        _print_predictions([(source.name(index), prediction) for index, prediction in sorted(found.items())])
        _name_left_out([f"{source.name(index)}: {problem}" for index, problem in problems.items()])
    if problems:
        raise typer.Exit(1)


def evaluate(
    model: ModelName,
    dataset: Annotated[str, typer.Option(help="a dataset's name")],
    evaluator: Annotated[list[str] | None, typer.Option(help="a registered one; without, all that suit")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="[EVALUATOR.]K=V", help="an argument, for one evaluator or for each")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a JSON file to write besides")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Measure a saved model with registered evaluators: values with their protocol and chance level."""
    import torch

    from vitkit import data
    from vitkit.files import write_json
    from vitkit.registry import evaluators

    names = evaluator or evaluators.names()
    arguments = _arguments(arg or [], names)
    built = {name: evaluators.build(name, **arguments[name]) for name in names if evaluator or _buildable(name, arguments)}
    loaded, resolved = _load(model, device, precision)
    images = data.build(dataset)
    place = next((parameter.device for parameter in loaded.parameters()), torch.device("cpu"))
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name, one in built.items():
        err.print(f"{name} ...", markup=False)
        try:
            torch.manual_seed(0)
            with torch.autocast(place.type, torch.bfloat16, enabled=resolved == "bf16"):
                scores = loaded.evaluate(one, images)
        except VitkitError as error:
            if evaluator:
                raise
            skipped[name] = str(error)
            continue
        for metric, value in scores.items():
            protocol = scores.protocols.get(metric)
            rows[metric] = {"value": value, "evaluator": name} | (asdict(protocol) if protocol else {})
    if not rows:
        raise UsageError(f"no evaluator suits this model: {'; '.join(f'{n}: {why}' for n, why in skipped.items())}")
    _print_scores(rows, f"{model} on {dataset}, {resolved}")
    for name, why in skipped.items():
        err.print(Text(f"{name} does not suit: {why}", style="dim"))
    if output is not None:
        specs = {name: one.spec.to_json() for name, one in built.items() if name not in skipped}
        weights = loaded.config["weights"]["sha256"]
        write_json(output, {
            "model": model, "weights": weights, "dataset": dataset, "precision": resolved, "evaluators": specs, "scores": rows,
        })  # fmt: skip


def export(
    model: ModelName,
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="ONNX, or torch's own exported program")] = "onnx",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: MODEL/model.onnx or .pt2")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model for other runtimes, and check that it gives the same numbers.

    Its input are images in [0, 1] of the size that its training saw, any number at a time; normalising is part of it.
    """
    from vitkit.models.export import SUFFIX
    from vitkit.models.export import export as write

    if output is None:
        if not Path(model).is_dir():
            raise UsageError("where to? give -o FILE")
        output = Path(model) / f"model{SUFFIX[format]}"
    loaded, _ = _load(model, "cpu", "fp32")
    done = write(loaded, output, format=format, overwrite=overwrite)
    channels, height, width = loaded.preprocessing["shape"]
    outputs = ", ".join(f"{name} (n, {size})" for name, size in done.outputs.items())
    out.print(
        f"{done.path}: images float32 (n, {channels}, {height}, {width}) in [0, 1] → {outputs}\n"
        f"the same numbers as the saved model: they differ by {done.difference:.1e} of the largest value at most",
        markup=False,
    )


COMMANDS: dict[str, Callable[..., None]] = {"embed": embed, "predict": predict, "eval": evaluate, "export": export}


def _load(name: str, device: str, precision: str) -> "tuple[Model, str]":
    """The model on its device, and the resolved precision."""
    import vitkit
    from vitkit.training.accelerator import resolve_device, resolve_precision

    place = resolve_device(device)
    return vitkit.load(name, device=place), resolve_precision(precision, place)


def _arguments(words: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`k=5` for each evaluator, `knn.k=5` for one."""
    from vitkit.training.recipe import parse_arguments

    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for word in words:
        owner, dot, _ = word.partition("=")[0].rpartition(".")
        if dot and owner not in found:
            raise UsageError(f"--arg {word}: no evaluator {owner!r} is asked; expected one of {', '.join(names)}")
        for name in [owner] if dot else names:
            found[name] |= parse_arguments([word.removeprefix(f"{owner}.") if dot else word])
    return found


def _buildable(name: str, arguments: dict[str, dict[str, Any]]) -> bool:
    """Whether an evaluator that nobody named can be built with what was given; a broken plugin costs only its own."""
    from vitkit.registry import evaluators

    try:
        evaluators.build(name, **arguments[name])
    except VitkitError as error:
        err.print(Text(f"{name} is left out: {error}", style="dim"))
        return False
    return True


@contextmanager
def _counting(total: int, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, elsewhere a line every half minute."""
    if err.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, _: bar.update(task, completed=done)
        return
    printed = time.monotonic()

    def count(done: int, _: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= PLAIN_SECONDS:
            printed = time.monotonic()
            err.print(f"{done:,} of {total:,} {what}")

    yield count


def _name_left_out(lines: Sequence[str], most: int = 20) -> None:
    for line in lines[:most]:
        err.print(f"left out: {line}", markup=False)
    if len(lines) > most:
        err.print(f"left out: {len(lines) - most:,} more")


def _console() -> Console:
    return out if out.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def _print_predictions(rows: Sequence[tuple[str, Any]]) -> None:
    if not rows:
        return
    measure = rows[0][1].measure
    table = Table("image", *(f"{place + 1}." for place in range(len(rows[0][1].labels))), caption=f"in brackets: {measure}")
    for name, prediction in rows:
        cells = (f"{label} ({score:.3f})" for label, score in zip(prediction.labels, prediction.scores, strict=True))
        table.add_row(Text(name), *map(Text, cells))
    _console().print(table)


def _print_scores(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table("metric", "value", "chance", "samples", "split", "frozen", "how", title=Text(title), title_justify="left")
    for metric, row in rows.items():
        chance = "" if row.get("chance") is None else f"{row['chance']:.4f}"
        samples = f"{row['samples']:,}" if "samples" in row else ""
        rest = (row.get("split", ""), row.get("frozen", ""), row.get("note", ""))
        table.add_row(Text(metric), f"{row['value']:.4f}", chance, samples, *map(Text, rest))
    _console().print(table)


__all__ = ["COMMANDS"]
