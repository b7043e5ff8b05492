"""`vitkit sample`, `vitkit interpolate` and `vitkit reconstruct`: PNG grids of a saved decoder's images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitkit.console import out
from vitkit.errors import UsageError, nearest, printable

if TYPE_CHECKING:
    from vitkit.contracts import Sheet
    from vitkit.data import ImageDataset
    from vitkit.models import Model

MOST_IMAGES = 1_024
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="the directory of a run that saved a decoder")]
DatasetOption = Annotated[
    str | None,
    typer.Option(help="a dataset, converted to the model's size and channels  [default: the dataset of the training]"),
]
DatasetArguments = Annotated[
    list[str] | None, typer.Option("--dataset-arg", metavar="NAME=VALUE", help="an argument for --dataset; may be repeated")
]
SeedOption = Annotated[int, typer.Option(help="seed of every random choice; the same seed gives the same file")]


def sample(
    run: RunArgument,
    count: Annotated[int, typer.Option(help="number of images")] = 64,
    seed: SeedOption = 0,
    name: Annotated[str | None, typer.Option("--class", help="a class for all images (needs a conditional decoder)")] = None,
    fitted: Annotated[
        bool, typer.Option("--fitted", help="draw latents from a Gaussian fitted to latents of training images  [default: N(0, I)]")
    ] = False,
    path: Annotated[Path, typer.Option("--out", "-o", help="the PNG file to write")] = Path("samples.png"),
) -> None:
    """Make images from random latents: a grid of samples, or one column per class with a conditional decoder."""
    _check_output(path)
    _check_count(count)
    from vitkit_vae.generate import classes_of, decoder_of, fit_gaussian, sample_sheet

    model = _load(run)
    label = None
    if name is not None:
        if classes_of(decoder_of(model)) is None:
            raise UsageError(
                f"--class {name}: the decoder in {run} was trained without classes; leave --class out, or train one with "
                f"num_classes"
            )
        label = _class(name, model.classes)
    decoder_of(model)
    prior = fit_gaussian(model, _dataset(model, run, None, None).train, seed=seed) if fitted else None
    sheet = sample_sheet(model, count, seed=seed, label=label, classes=model.classes, prior=prior)
    line = f"{count} samples{'' if name is None else f' of {name}'}, seed {seed}"
    _write(path, sheet, line + (", latents from a Gaussian fitted to those of training images" if fitted else ""))


def interpolate(
    run: RunArgument,
    first: Annotated[str, typer.Argument(metavar="FROM", help="a test image's number, or a class")],
    second: Annotated[str, typer.Argument(metavar="TO", help="a test image's number, or a class")],
    steps: Annotated[int, typer.Option(help="number of images, both ends included")] = 8,
    classes: Annotated[bool, typer.Option("--classes", help="read FROM and TO as classes, even if they are numbers")] = False,
    dataset: DatasetOption = None,
    dataset_arg: DatasetArguments = None,
    path: Annotated[Path, typer.Option("--out", "-o", help="the PNG file to write")] = Path("interpolation.png"),
) -> None:
    """Decode latents between two test images, or between the mean latents of two classes."""
    _check_output(path)
    if not 2 <= steps <= MOST_IMAGES:
        raise UsageError(f"--steps {steps}: expected 2 to {MOST_IMAGES:,} images, both ends included")
    from vitkit_vae.generate import class_end, decoder_of, image_end, interpolation_sheet

    model = _load(run)
    decoder_of(model)
    data = _dataset(model, run, dataset, dataset_arg)
    ends = []
    for given in (first, second):
        if given.lstrip("-").isdecimal() and not classes:
            end = image_end(model, data.test, int(given), data.classes)
        else:
            end = class_end(model, data.test, data.classes[_class(given, data.classes)], data.classes)
        ends.append(end if data.classes == model.classes else replace(end, label=None))
    sheet = interpolation_sheet(model, [(ends[0], ends[1])], steps=steps, classes=model.classes)
    _write(path, sheet, f"{steps} steps from {ends[0].caption} to {ends[1].caption}, {data.name}")


def reconstruct(
    run: RunArgument,
    dataset: DatasetOption = None,
    dataset_arg: DatasetArguments = None,
    count: Annotated[int, typer.Option(help="number of test images, in equal shares per class as far as possible")] = 16,
    seed: SeedOption = 0,
    path: Annotated[Path, typer.Option("--out", "-o", help="the PNG file to write")] = Path("reconstructions.png"),
) -> None:
    """Encode and decode test images: originals above reconstructions, each with its error."""
    _check_output(path)
    _check_count(count)
    from vitkit_vae.generate import decoder_of, reconstruction_figure

    model = _load(run)
    decoder_of(model)
    data = _dataset(model, run, dataset, dataset_arg)
    labelled = data.classes == model.classes
    sheet, error = reconstruction_figure(model, data.test, data.classes, count=count, seed=seed, labelled=labelled)
    _write(path, sheet, f"{min(count, len(data.test))} test images of {data.name}, seed {seed}, mean squared error {error:.4f}")


def _load(run: str) -> "Model":
    import vitkit

    return vitkit.load(run)


def _dataset(model: "Model", run: str, name: str | None, arguments: list[str] | None) -> "ImageDataset":
    """The dataset of the training, or another one adapted to the model."""
    from vitkit import data
    from vitkit.data import Preprocessing
    from vitkit.training import parse_arguments
    from vitkit_eval import adapted, training_data

    if not model.preprocessing:
        raise UsageError(f"the model in {run} was saved without preprocessing, so images cannot be prepared for it")
    if name is None and arguments:
        raise UsageError("--dataset-arg is an argument of --dataset; name the dataset, too")
    dataset = training_data(model, run) if name is None else data.build(name, **parse_arguments(arguments or []))
    preprocessing = Preprocessing.from_json(model.preprocessing)
    try:
        train, test = adapted(dataset.train, preprocessing), adapted(dataset.test, preprocessing)
    except UsageError as error:
        raise UsageError(f"{printable(dataset.name)} does not fit the model in {run}: {error}") from None
    if name is not None and dataset.shape != preprocessing.shape:
        given, taken = ("×".join(map(str, shape)) for shape in (dataset.shape, preprocessing.shape))
        out.print(f"images of {printable(dataset.name)} are {given} (channels, height, width), adapted to the model's {taken}")
    return replace(dataset, train=train, test=test)


def _class(name: str, classes: list[str]) -> int:
    if name not in classes:
        raise UsageError(f"there is no class {name!r}{nearest(name, classes) or ';'} classes: {printable(', '.join(classes[:40]))}")
    return classes.index(name)


def _check_count(count: int) -> None:
    if not 1 <= count <= MOST_IMAGES:
        raise UsageError(f"--count {count}: expected 1 to {MOST_IMAGES:,} images")


def _check_output(path: Path) -> None:
    """Checked before any work is done."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: the file is a PNG; give a name that ends in .png")
    from vitkit.files import check_output
    from vitkit.report import is_sheet

    check_output(path, overwrite=True, is_ours=is_sheet, kind="an image that vitkit drew", option="--out")


def _write(path: Path, sheet: "Sheet", line: str) -> None:
    from vitkit.report import write_sheet

    write_sheet(path, sheet)
    out.print(f"{printable(path)}: {printable(line)}")
