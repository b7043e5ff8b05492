"""`vitkit compare`: runs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkit.errors import UsageError
from vitkit.files import write_text
from vitkit.rundir import read_summary


def compare(runs: Sequence[Path], page: Path) -> None:
    """Print what differs between runs and how they ended, and write a page with their curves in one picture.

    Raises `UsageError` for fewer than two runs and for a directory that holds none.
    """
    if len(runs) < 2:
        raise UsageError("compare needs at least two run directories")
    summaries = {}
    for path, label in zip(runs, _labels(runs), strict=True):
        summary = read_summary(path)
        if not summary:
            raise UsageError(f"{path} holds no run: there is no readable summary.json in it")
        summaries[label] = summary
    differing = _differences(summaries)
    results = _results(summaries)
    console = Console(highlight=False)
    _print(console, "what differs", differing, summaries)
    _print(console, "results (last evaluation)", results, summaries, best=True)
    _write_page(page, dict(zip(summaries, runs, strict=True)), summaries, differing, results)
    console.print(f"curves: {page}", markup=False)


def _labels(runs: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [path.resolve().parts for path in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UsageError("the same run is named twice")


def _differences(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Arguments and settings that are not the same in all runs, a value a run."""
    rows: dict[str, list[str]] = {}
    flat = [_flat(summary) for summary in summaries.values()]
    for name in dict.fromkeys(name for values in flat for name in values):
        cells = [str(values.get(name, "–")) for values in flat]
        if len(set(cells)) > 1:
            rows[name] = cells
    return rows


def _flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    values = {"recipe": summary.get("recipe"), "dataset": (summary.get("dataset") or {}).get("name")}
    values |= summary.get("arguments") or {}
    values |= summary.get("settings") or {}
    values |= {f"version of {name}": version for name, version in (summary.get("versions") or {}).items()}
    return {**values, "parameters": summary.get("parameters"), "status": summary.get("status")}


def _results(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float | None]]:
    finals = [{**(s.get("final") or {}), "seconds": s.get("seconds")} for s in summaries.values()]
    finals = [{**f, "images_per_second": s.get("images_per_second")} for f, s in zip(finals, summaries.values(), strict=True)]
    return {name: [final.get(name) for final in finals] for name in dict.fromkeys(n for final in finals for n in final)}


def _print(
    console: Console, title: str, rows: Mapping[str, Sequence[Any]], labels: Mapping[str, Any], *, best: bool = False
) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(Text(label), overflow="fold")
    for name, cells in rows.items():
        table.add_row(Text(name), *_marked(name, cells) if best else [Text(cell) for cell in cells])
    console.print(table if rows else f"{title}: nothing")


def _marked(name: str, cells: Sequence[float | None]) -> list[Text]:
    """Values with the best one bold, and after the first run the difference from it."""
    numbers = [cell for cell in cells if cell is not None]
    smaller = name.endswith(("loss", "mse", "seconds"))
    winner = (min(numbers) if smaller else max(numbers)) if numbers else None
    first, texts = cells[0], []
    for index, cell in enumerate(cells):
        if cell is None:
            texts.append(Text("–"))
            continue
        text = Text(f"{cell:.4f}", style="bold" if cell == winner else "")
        if index and first is not None:
            text.append(f" ({cell - first:+.4f})", style="dim")
        texts.append(text)
    return texts


def _write_page(
    page: Path,
    paths: Mapping[str, Path],
    summaries: Mapping[str, Mapping[str, Any]],
    differing: Mapping[str, Sequence[str]],
    results: Mapping[str, Sequence[float | None]],
) -> None:
    from vitkit.plots import metric_panels
    from vitkit.report import document, image, png, read_rows, shown, table

    metrics = {label: read_rows(path / "metrics.csv") for label, path in paths.items()}
    names = [name for name in dict.fromkeys(n for rows in metrics.values() for row in rows for n in row)]
    names = [name for name in names if name not in ("epoch", "step")]
    references = {label: lines for summary in summaries.values() for label, lines in (summary.get("references") or {}).items()}
    protocols = {name: value for summary in summaries.values() for name, value in (summary.get("protocols") or {}).items()}
    body = [f"<h1>{len(paths)} runs</h1>"]
    if names:
        body.append(image("curves", png(metric_panels(metrics, names, references, protocols)), broad=True))
    head = ["", *paths]
    rows = [[name, *(shown(cell) for cell in cells)] for name, cells in results.items()]
    body.append(f"<h2>Results</h2>{table(head, rows, 'after the last evaluation')}")
    body.append(f"<h2>What differs</h2>{table(head, [[name, *cells] for name, cells in differing.items()])}")
    write_text(page, document("runs compared", "\n".join(body)))
