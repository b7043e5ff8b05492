"""`vitkit search`: the images nearest to a caption, and the captions and images nearest to an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vitkit.console import cell, out
from vitkit.errors import UsageError, printable

if TYPE_CHECKING:
    from vitkit.data import Preprocessing
    from vitkit.models import Model
    from vitkit_clip.search import Answer, Gallery, Nearest

MOST_SHOWN = 100
SKIPPED_SHOWN = 5


def search(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the directory of a run that saved a backbone, or a model of pairs")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="a caption, or the path of an image")],
    dataset: Annotated[
        str | None, typer.Option(help="search its test images, or pairs of them  [default: the dataset of the training]")
    ] = None,
    dataset_arg: Annotated[
        list[str] | None, typer.Option("--dataset-arg", metavar="NAME=VALUE", help="an argument for --dataset; may be repeated")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="search the images in a folder and its subfolders")] = None,
    count: Annotated[int, typer.Option(help="number of nearest images and captions to show")] = 10,
    among: Annotated[int, typer.Option(help="largest number of pairs, or of images of the folder, to search")] = 10_000,
    seed: Annotated[int, typer.Option(help="seed of the choice of pairs")] = 0,
    path: Annotated[Path, typer.Option("--out", "-o", help="the PNG file to write")] = Path("search.png"),
) -> None:
    """Search by image with any saved backbone, or by caption with a model of pairs, and show the nearest images.

    Without --dataset and --folder it searches test images of the dataset of the training. A model of pairs of images and captions
    (recipes/clip_cifar100.py) searches pairs, and also shows the captions nearest to an image. An image about twice as wide as high is
    a pair; any other image is placed on both halves.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: the file is a PNG; give a name that ends in .png")
    if not 1 <= count <= MOST_SHOWN:
        raise UsageError(f"--count {count}: expected 1 to {MOST_SHOWN}")
    if among < 1:
        raise UsageError(f"--among {among}: expected at least 1")
    if dataset is not None and folder is not None:
        raise UsageError("--dataset and --folder exclude each other: give one of them")
    if dataset is None and dataset_arg:
        raise UsageError("--dataset-arg is an argument of --dataset; name the dataset, too")
    if not query.strip():
        raise UsageError(
            "the caption is empty; give some text, such as 'the photo on the left is ...', or an image's path"
        )
    import vitkit
    from vitkit.files import check_output
    from vitkit.models import open_image
    from vitkit.report import is_sheet, write_sheet
    from vitkit_clip.retrieval import check_towers, half_of
    from vitkit_clip.search import as_pair, find_by_caption, find_by_image

    # A wrong query is refused before a model is loaded and a gallery encoded.
    image = open_image(query) if _is_image(query) else None
    if image is not None and path.exists() and path.samefile(query):
        raise UsageError(f"--out {path} is the query image; give another name")
    check_output(path, overwrite=True, is_ours=is_sheet, kind="an image that vitkit drew", option="--out")
    model = vitkit.load(run)
    if image is not None and getattr(model, "text", None) is None:
        answer, gallery, searched = _similar(model, run, image, dataset, dataset_arg, folder, among, count)
        _print(answer, gallery, searched)
        write_sheet(path, answer.sheet)
        out.print(f"{printable(path)}: {len(answer.sheet.captions)} images")
        return
    check_towers(model)
    half = half_of(model)
    gallery, searched = _gallery(model, run, half, dataset, dataset_arg, folder, among, seed)
    if image is None:
        answer = find_by_caption(model, query, gallery, count)
    else:
        answer = find_by_image(model, as_pair(image, half), gallery, count, half)
    _print(answer, gallery, searched)
    write_sheet(path, answer.sheet)
    out.print(f"{printable(path)}: {len(answer.sheet.captions)} images")


def _similar(
    model: "Model", run: str, image: Any, name: str | None, arguments: list[str] | None, folder: Path | None, among: int, count: int
) -> "tuple[Answer, Gallery, str]":
    """The images nearest to one image, by a backbone of single images."""
    from vitkit import data
    from vitkit.training import parse_arguments
    from vitkit_clip.similar import SplitGallery, as_single, find_similar, preprocessing_of, similar_images
    from vitkit_eval import training_data

    preprocessing = preprocessing_of(model)
    gallery: Any
    if folder is not None:
        gallery, searched = similar_images(folder, preprocessing, among), str(folder)
    else:
        dataset = training_data(model, run) if name is None else data.build(name, **parse_arguments(arguments or []))
        gallery, searched = SplitGallery(dataset.with_preprocessing(preprocessing), among), dataset.name
    return find_similar(model, as_single(image, preprocessing), gallery, count, preprocessing), gallery, searched


def _is_image(query: str) -> bool:
    from vitkit.data import SUFFIXES

    try:
        exists = Path(query).is_file()
    except (OSError, ValueError):  # a caption can be longer than a path
        exists = False
    if not exists and query.lower().endswith(SUFFIXES):
        raise UsageError(f"there is no image {query}; give the path of one, or a caption")
    return exists


def _gallery(
    model: "Model",
    run: str,
    half: "Preprocessing",
    name: str | None,
    arguments: list[str] | None,
    folder: Path | None,
    among: int,
    seed: int,
) -> tuple["Gallery", str]:
    from vitkit import data
    from vitkit.training import parse_arguments
    from vitkit_clip.pairs import Pairs
    from vitkit_clip.search import BATCH_SIZE, FolderGallery, PairGallery
    from vitkit_eval import adapted, training_data

    if folder is not None:
        return FolderGallery(folder, half, among), str(folder)
    dataset = training_data(model, run) if name is None else data.build(name, **parse_arguments(arguments or []))
    try:
        test = adapted(dataset.test, half)
    except UsageError as error:
        raise UsageError(f"{printable(dataset.name)} does not fit the model in {run}: {error}") from None
    pairs = Pairs(test, dataset.classes, BATCH_SIZE).fixed(seed, among)
    return PairGallery(pairs), f"{among:,} pairs of {dataset.name}'s test images, seed {seed}"


def _print(answer: "Answer", gallery: Any, searched: str) -> None:
    if answer.unknown:
        words = printable(", ".join(map(repr, answer.unknown)))
        out.print(f"note: the model's vocabulary does not have {words}: all unknown words are the same to it")
    for skipped in getattr(gallery, "skipped", [])[:SKIPPED_SHOWN]:
        out.print(f"left out: {printable(skipped)}")
    if answer.captions is not None:
        out.print(_table("nearest captions", "caption", answer.captions))
    out.print(_table(f"nearest in {searched}", "image", answer.images))


def _table(title: str, kind: str, nearest: "Nearest") -> Table:
    table = Table("place", "cosine", kind, title=cell(title), title_justify="left")
    for place, (name, score) in enumerate(zip(nearest.names, nearest.scores, strict=True), start=1):
        table.add_row(str(place), f"{score:.4f}", cell(name))
    return table
