"""`vitkit embed`, `predict`, `eval` and `export`: the uses of a saved model."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from vitkit.cli.console import cell, err, is_utf8, out
from vitkit.errors import UnknownNameError, UsageError, VitkitError, printable, shell_command
from vitkit.validation import at_least

if TYPE_CHECKING:
    from vitkit.models.model import Model

PROGRESS_SECONDS = 30.0
"""Seconds between two lines of progress without a terminal."""
LISTED_PROBLEMS = 20

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a directory that a run saved into, or a Hub repository OWNER/NAME")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="auto: cuda, else mps (Apple), else cpu")]
Precision = Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 if the device computes fast in it, else fp32")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier output of this command")]


def embed(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="a folder, a dataset's name, or image files")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the .safetensors file to write")],
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="the split of a dataset")] = "test",
    batch_size: Annotated[int, typer.Option(help="images encoded at a time")] = 256,
    device: Device = "auto",
    precision: Precision = "fp32",
    overwrite: Overwrite = False,
) -> None:
    """Write the features of many images into a safetensors file.

    The file holds `features` float32 (n d), `labels` where they are known, and the names of the images in its metadata. An image
    that cannot be read is named and left out. After an interruption the same command resumes.
    """
    from vitkit.models.embed import embed as write
    from vitkit.models.image_sources import find_source

    source = find_source(images, split=split)
    print_left_out(source.left_out)
    loaded, resolved = _load(model, device, precision)
    try:
        with _counting(len(source), "images") as count:
            result = write(
                loaded, source, output, model_name=model, batch_size=batch_size, precision=resolved,
                overwrite=overwrite, progress=count,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print(f"interrupted; the same command resumes from {printable(output)}.partial")
        raise
    if result.resumed:
        err.print(f"{result.resumed:,} images were embedded before")
    print_left_out(result.skipped)
    out.print(f"{printable(result.path)}: features of {result.count:,} images, {result.width} numbers each")


def predict(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE ...", help="image files, or folders of them")],
    top: Annotated[int, typer.Option(help="labels to print for each image")] = 3,
    label: Annotated[list[str] | None, typer.Option(help="a text to compare with images; may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON with all labels, for programs")] = False,
    batch_size: Annotated[int, typer.Option(help="images encoded at a time")] = 64,
    device: Device = "auto",
) -> None:
    """Predict the classes of images with their probabilities, or the nearest labels with their cosine similarity.

    An image that cannot be read is named and left out, and the exit code is 1.
    """
    from vitkit.models.image_sources import Files, find_source
    from vitkit.models.predict import predict as predict_batch

    at_least(1, **{"--batch-size": batch_size, "--top": top})
    source = find_source(images)
    if not isinstance(source, Files):
        raise UsageError(f"{images[0]!r} is a dataset; predict takes image files; `vitkit eval` measures on datasets")
    print_left_out(source.left_out)
    loaded, _ = _load(model, device, "fp32")
    place = next((parameter.device for parameter in loaded.parameters()), "cpu")
    predictions: dict[int, Any] = {}
    problems: dict[int, str] = {}
    for batch in source.batches(loaded, range(0, len(source), batch_size), batch_size):
        problems |= batch.problems
        if batch.images is not None:
            answers = predict_batch(loaded, batch.images.to(place), labels=label, top=None if as_json else top)
            predictions |= dict(zip(batch.rows, answers, strict=True))
    if as_json:
        rows = [
            {"image": source.name(index)}
            | (asdict(predictions[index]) if index in predictions else {"error": problems[index]})
            for index in range(len(source))
        ]
        text = json.dumps(rows, ensure_ascii=not is_utf8())
        out.print(text.encode("utf-8", "backslashreplace").decode())  # names may not be UTF-8; this is JSON's escape too
    else:
        _print_predictions([(source.name(index), prediction) for index, prediction in sorted(predictions.items())])
        print_left_out([f"{source.name(index)}: {problem}" for index, problem in problems.items()])
    if problems:
        raise typer.Exit(1)


def evaluate(
    model: ModelName,
    dataset: Annotated[str, typer.Option(help="a dataset's name")],
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="the split to measure on")] = "test",
    evaluator: Annotated[list[str] | None, typer.Option(help="an evaluator; may be repeated  [default: all that suit the model]")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="[EVALUATOR.]K=V", help="an argument for one evaluator, or for each; may be repeated")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="also write the scores into this JSON file")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure a saved model with registered evaluators, and show each value with its protocol and chance level."""
    import torch

    from vitkit.files import check_output, write_json
    from vitkit.registry import evaluators

    if output is not None:
        check_output(output, overwrite=overwrite, is_ours=_holds_scores, kind="a JSON file of scores")
    names = evaluator or evaluators.names()
    arguments = _arguments(arg or [], names)
    built = {name: evaluators.build(name, **arguments[name]) for name in names if evaluator or _buildable(name, arguments)}
    loaded, resolved = _load(model, device, precision)
    images = _dataset(dataset)
    place = next((parameter.device for parameter in loaded.parameters()), torch.device("cpu"))
    rows: dict[str, dict[str, Any]] = {}
    unsuitable: dict[str, str] = {}
    for name, measure in built.items():
        err.print(f"{printable(name)} ...")
        try:
            torch.manual_seed(0)
            with torch.autocast(place.type, torch.bfloat16, enabled=resolved == "bf16"):
                scores = loaded.evaluate(measure, images, split)
        except VitkitError as error:
            if evaluator:
                raise
            unsuitable[name] = str(error)
            continue
        for metric, value in scores.items():
            protocol = scores.protocols.get(metric)
            rows[metric] = {"value": value, "evaluator": name} | (asdict(protocol) if protocol else {})
    if not rows:
        raise UsageError(f"no evaluator suits this model: {'; '.join(f'{n}: {printable(why)}' for n, why in unsuitable.items())}")
    if output is not None:  # before anything is printed: the reader may have closed the pipe
        specs = {name: measure.spec.to_json() for name, measure in built.items() if name not in unsuitable}
        weights = loaded.config["weights"]["sha256"]
        write_json(output, {
            "model": model, "weights": weights, "dataset": dataset, "split": split, "precision": resolved, "evaluators": specs,
            "scores": rows,
        })  # fmt: skip
    _print_scores(rows, f"{model} on {dataset}, {resolved}")
    for name, why in unsuitable.items():
        err.print(cell(f"{name} does not suit: {why}", "dim"))


def export(
    model: ModelName,
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="ONNX, or torch's own exported program")] = "onnx",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="[default: MODEL/model.onnx or MODEL/model.pt2]")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model for other runtimes, and check that it computes the same numbers.

    The input of the exported model is any number of images in [0, 1], of the size used in training. The exported model normalises them.
    """
    from vitkit.models.export import SUFFIX
    from vitkit.models.export import export as write

    if output is None and "/" in model and not Path(model).exists():
        raise UsageError(f"{printable(model)} is no local directory, so the output has no default path; give -o FILE")
    loaded, _ = _load(model, "cpu", "fp32")
    output = output or Path(model) / f"model{SUFFIX[format]}"
    result = write(loaded, output, format=format, overwrite=overwrite)
    channels, height, width = loaded.preprocessing["shape"]
    outputs = ", ".join(f"{printable(name)} (n, {size})" for name, size in result.outputs.items())
    out.print(
        f"{printable(result.path)}: images float32 (n, {channels}, {height}, {width}) in [0, 1] → {outputs}\n"
        f"checked against the saved model: the numbers differ by at most {result.difference:.1e} of the largest value"
    )


COMMANDS: dict[str, Callable[..., None]] = {"embed": embed, "predict": predict, "eval": evaluate, "export": export}


def _load(name: str, device: str, precision: str) -> "tuple[Model, str]":
    """The model on its device, and the resolved precision."""
    import vitkit
    from vitkit.training.accelerator import resolve_device, resolve_precision

    if not name.strip():
        raise UsageError("MODEL is empty; give a directory that a run saved into, or a Hub repository OWNER/NAME")
    if name.startswith(("http://", "https://")):
        raise UsageError(f"MODEL is the address {printable(name)}; give a repository of the Hub as OWNER/NAME, or a directory")
    place = resolve_device(device)
    return vitkit.load(name, device=place), resolve_precision(precision, place)


def _dataset(name: str) -> Any:
    from vitkit import data

    try:
        return data.build(name)
    except UnknownNameError as error:
        if not name.strip() or not Path(name).is_dir():
            raise
        command = shell_command("vitkit", "data", "import", name, "--name", "mine")
        raise UsageError(
            f"--dataset {printable(name)}: {printable(name)} is a folder; import it with `{command}`, then give --dataset mine ({error})"
        ) from None


def _arguments(words: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arguments by evaluator: `k=5` is for all evaluators, `knn.k=5` for one."""
    from vitkit.training.recipe import parse_arguments

    arguments: dict[str, dict[str, Any]] = {name: {} for name in names}
    for word in words:
        owner, dot, _ = word.partition("=")[0].rpartition(".")
        if dot and owner not in arguments:
            raise UsageError(f"--arg {printable(word)}: the evaluator {owner!r} is not selected; expected one of {', '.join(names)}")
        for name in [owner] if dot else names:
            arguments[name] |= parse_arguments([word.removeprefix(f"{owner}.") if dot else word])
    return arguments


def _buildable(name: str, arguments: dict[str, dict[str, Any]]) -> bool:
    """Whether an evaluator that was not named can be built with the given arguments; a line reports one that cannot."""
    from vitkit.registry import evaluators

    try:
        evaluators.build(name, **arguments[name])
    except VitkitError as error:
        err.print(cell(f"{name} is left out: {error}", "dim"))
        return False
    return True


def _holds_scores(path: Path) -> bool:
    """Whether a file is an earlier output of `vitkit eval`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"weights", "evaluators", "scores"} <= content.keys()


@contextmanager
def _counting(total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; without a terminal a line every half minute."""
    if err.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task(unit, total=total)
            yield lambda done, _: bar.update(task, completed=done)
        return
    printed = time.monotonic()

    def count(done: int, _: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= PROGRESS_SECONDS:
            printed = time.monotonic()
            err.print(f"{done:,} of {total:,} {unit}")

    yield count


def print_left_out(lines: Sequence[str]) -> None:
    for line in lines[:LISTED_PROBLEMS]:
        err.print(f"left out: {printable(line)}")
    if len(lines) > LISTED_PROBLEMS:
        err.print(f"left out: {len(lines) - LISTED_PROBLEMS:,} more")


def _print_predictions(rows: Sequence[tuple[str, Any]]) -> None:
    if not rows:
        return
    measure = rows[0][1].measure
    places = (f"{place + 1}." for place in range(len(rows[0][1].labels)))
    table = Table("image", *places, caption=cell(f"in brackets: {measure}"))
    for name, prediction in rows:
        answers = (f"{label} ({score:.3f})" for label, score in zip(prediction.labels, prediction.scores, strict=True))
        table.add_row(*map(cell, (name, *answers)))
    out.print(table)


def _print_scores(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table("metric", "value", "chance", "samples", "split", "frozen", "how", title=cell(title), title_justify="left")
    for metric, row in rows.items():
        chance = "" if row.get("chance") is None else f"{row['chance']:.4f}"
        samples = f"{row['samples']:,}" if "samples" in row else ""
        value = f"{row['value']:.4f}" + (f" {row['unit']}" if row.get("unit") else "")
        texts = (row.get("split", ""), row.get("frozen", ""), row.get("note", ""))
        table.add_row(*map(cell, (metric, value, chance, samples, *texts)))
    out.print(table)


__all__ = ["COMMANDS"]
