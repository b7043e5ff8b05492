"""`vitkit search`: the pictures nearest to a caption, the captions and pictures nearest to a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vitkit.errors import UsageError

if TYPE_CHECKING:
    from vitkit.data import Preprocessing
    from vitkit.models import Model
    from vitkit_clip.search import Answer, Found, Gallery

MOST = 100
out = Console(highlight=False, soft_wrap=True)


def search(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a directory that a run saved a model of pairs into")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="a caption, or the path of a picture")],
    dataset: Annotated[str | None, typer.Option(help="search pairs of another dataset's test images")] = None,
    folder: Annotated[Path | None, typer.Option(help="search the pictures below a folder")] = None,
    count: Annotated[int, typer.Option(help="how many of the nearest to show")] = 10,
    among: Annotated[int, typer.Option(help="how many pairs, or pictures of the folder, to search at most")] = 10_000,
    seed: Annotated[int, typer.Option(help="which pairs of the dataset's images")] = 0,
    path: Annotated[Path, typer.Option("--out", "-o", help="the PNG file to write")] = Path("search.png"),
) -> None:
    """Search by caption or by picture: the nearest pictures, and for a picture the nearest captions.

    Without --dataset and --folder the run's own test pairs are searched. A picture about twice as wide as high is a pair;
    any other stands on both halves.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: a PNG is written; give a name that ends in .png")
    if not 1 <= count <= MOST:
        raise UsageError(f"--count {count}: expected 1 to {MOST}")
    if among < 1:
        raise UsageError(f"--among {among}: expected at least 1")
    if dataset is not None and folder is not None:
        raise UsageError("--dataset and --folder exclude each other: give one of them")
    if not query.strip():
        raise UsageError(
            "the caption is empty; give some text, such as 'the photo on the left is ...', or a picture's path"
        )
    import vitkit
    from vitkit.models import read_picture
    from vitkit.report import write_sheet
    from vitkit_clip.retrieval import check_towers, half_of
    from vitkit_clip.search import as_pair, find_by_caption, find_by_picture

    # Whatever is wrong with the query is said before a model is loaded and a gallery encoded.
    picture = read_picture(query) if _is_picture(query) else None
    if picture is not None and path.exists() and path.samefile(query):
        raise UsageError(f"--out {path} is the picture that is searched for; give another name")
    model = vitkit.load(run)
    check_towers(model)
    half = half_of(model)
    gallery, searched = _gallery(model, run, half, dataset, folder, among, seed)
    if picture is None:
        answer = find_by_caption(model, query, gallery, count)
    else:
        answer = find_by_picture(model, as_pair(picture, half), gallery, count, half)
    _tell(answer, gallery, searched)
    write_sheet(path, answer.sheet)
    out.print(f"{path}: {len(answer.sheet.captions)} pictures", markup=False)


def _is_picture(query: str) -> bool:
    from vitkit.data import SUFFIXES

    try:
        found = Path(query).is_file()
    except (OSError, ValueError):  # a caption longer than a path may be
        found = False
    if not found and query.lower().endswith(SUFFIXES):
        raise UsageError(f"there is no picture {query}; give the path of one, or a caption")
    return found


def _gallery(
    model: "Model", run: str, half: "Preprocessing", name: str | None, folder: Path | None, among: int, seed: int
) -> tuple["Gallery", str]:
    from vitkit import data
    from vitkit_clip.pairs import Pairs
    from vitkit_clip.search import BATCH, FolderGallery, PairGallery
    from vitkit_eval import adapted

    if folder is not None:
        return FolderGallery(folder, half, among), str(folder)
    own: Any = model.config.get("dataset")
    if name is None and not isinstance(own, str):
        raise UsageError(f"{run} does not say what dataset it was trained on; name one with --dataset, or --folder DIR")
    found = data.build(own if name is None else name)
    try:
        test = adapted(found.test, half)
    except UsageError as error:
        raise UsageError(f"{found.name} cannot be shown to the model in {run}: {error}") from None
    pairs = Pairs(test, found.classes, BATCH).fixed(seed, among)
    return PairGallery(pairs), f"{among:,} pairs of {found.name}'s test images, seed {seed}"


def _tell(answer: "Answer", gallery: Any, searched: str) -> None:
    if answer.unknown:
        out.print(
            f"note: this model never read {', '.join(map(repr, answer.unknown))}: to it all such words are the same",
            markup=False,
        )
    for skipped in getattr(gallery, "skipped", [])[:5]:
        out.print(f"left out: {skipped}", markup=False)
    if answer.captions is not None:
        out.print(_table("nearest captions", "caption", answer.captions))
    out.print(_table(f"nearest in {searched}", "picture", answer.pictures))


def _table(title: str, what: str, found: "Found") -> Table:
    from rich.markup import escape

    table = Table("place", "cosine", what, title=escape(title), title_justify="left")
    for place, (name, score) in enumerate(zip(found.names, found.scores, strict=True), start=1):
        table.add_row(str(place), f"{score:.4f}", escape(name))
    return table
