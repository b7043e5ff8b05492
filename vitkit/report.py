"""A run's report: one self-contained page, and the plots in it as PNG files."""

import base64
import csv
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vitkit.contracts import Picture
from vitkit.files import atomic_write, write_text
from vitkit.plots import picture_plot, run_plots
from vitkit.rundir import read_summary

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6778; --line: #d9dee7; --card: #f5f7fa; --page: #fff;
  --accent: #0072b2; --warn: #8a2b00; --warnpage: #fff0e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b8; --line: #333c4d; --card: #1b212c;
  --page: #12161e; --accent: #56b4e9; --warn: #ffb38a; --warnpage: #3a2113; } }
* { box-sizing: border-box } body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 68rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem } .soft { color: var(--soft) }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); margin: 1.3rem 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem }
.card b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums } .card span { font-size: .84rem }
.warning { background: var(--warnpage); color: var(--warn); border: 2px solid; border-radius: .6rem; padding: .9rem 1.1rem;
  font-weight: 600; margin: 1rem 0; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-size: .92rem } .wide { overflow-x: auto }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.number { font-variant-numeric: tabular-nums } caption { text-align: left; color: var(--soft); padding-bottom: .4rem }
figure { margin: 0 0 1.2rem } figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
.plots figure.broad { grid-column: 1 / -1 }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto }
"""


def write_report(directory: Path, pictures: Mapping[str, Picture] | None = None) -> Path:
    """Write `plots/*.png` and `report.html` from a run's `losses.csv`, `metrics.csv` and `summary.json`.

    `pictures` are confusion matrices, maps of embeddings and attention sheets by name. Everything is in the one page:
    it can be sent to somebody as it is. Raises `RunError` where it cannot be written.
    """
    summary = read_summary(directory)
    losses, metrics = read_rows(directory / "losses.csv"), read_rows(directory / "metrics.csv")
    figures = run_plots(losses, metrics, summary)
    figures |= {name: picture_plot(name, picture) for name, picture in (pictures or {}).items()}
    images = {name: png(figure) for name, figure in figures.items()}
    for name, data in images.items():
        with atomic_write(directory / "plots" / f"{name}.png") as temporary:
            temporary.write_bytes(data)
    page = directory / "report.html"
    write_text(page, _page(summary, images))
    return page


def read_rows(path: Path) -> list[dict[str, float | None]]:
    """A run's CSV table as numbers; empty cells are None. An empty list where there is no such file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: _number(value) for name, value in row.items() if name} for row in csv.DictReader(file)]
    except OSError:
        return []


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def png(figure: Figure) -> bytes:
    """A figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def document(title: str, body: str) -> str:
    """A page that needs nothing from anywhere else."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], caption: str = "") -> str:
    """An HTML table; every cell is escaped."""
    top = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=number' if _is_number(cell) else ''}>{_text(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def image(name: str, data: bytes, broad: bool = False) -> str:
    """A figure of the page."""
    kind = ' class="broad"' if broad else ""
    source = base64.b64encode(data).decode()
    return f'<figure{kind}><img alt="{_text(name.replace("_", " "))}" src="data:image/png;base64,{source}"></figure>'


def shown(value: Any) -> str:
    """A value as tables print it: four digits, or a dash for none."""
    if value is None or value == "":
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _page(summary: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    data = summary.get("dataset") or {}
    settings = summary.get("settings") or {}
    name = summary.get("recipe", "run")
    line = " · ".join(
        filter(None, [
            f"status: {summary.get('status', 'unknown')}", f"dataset: {data.get('name')}" if data else "",
            f"seed {summary.get('seed')}", f"{summary.get('epochs', 0)} epochs",
            f"{summary.get('seconds', 0):.0f} s on {settings.get('device', '?')} ({settings.get('precision', '?')})",
            str(summary.get("started", "")),
        ])
    )  # fmt: skip
    body = [f"<h1>{_text(name)}</h1><p class='soft'>{_text(line)}</p>"]
    if data.get("fallback_for"):
        body.append(f'<p class="warning" role="alert">{_text(data.get("notice") or "a stand-in dataset was used")}</p>')
    elif data.get("notice"):
        body.append(f'<p class="warning">{_text(data["notice"])}</p>')
    body += [_cards(summary), _results(summary)]
    broad = ("metrics",)
    plots = "".join(image(name, png_data, broad=name in broad) for name, png_data in images.items())
    body.append(f'<h2>Plots</h2><div class="plots">{plots}</div>' if plots else "")
    if summary.get("command"):
        body.append(f"<h2>Again</h2><pre>{_text(summary['command'])}</pre>")
    size = f"{summary.get('parameters', 0):,} parameters, {summary.get('steps', 0):,} steps"
    rate = f"{summary.get('images_per_second', 0):.0f} images/s in training"
    body.append(f"<p class='soft'>{_text(size)}, {_text(rate)}, {_text(summary.get('machine', ''))}</p>")
    for title, key in (("Arguments", "arguments"), ("Settings", "settings"), ("Dataset", "dataset"), ("Versions", "versions")):
        rows = [(name, shown_plainly(value)) for name, value in (summary.get(key) or {}).items() if name != "notice"]
        if rows:
            body.append(f"<h2>{title}</h2>{table(('', ''), rows)}")
    return document(f"{name}: report", "\n".join(body))


def shown_plainly(value: Any) -> str:
    """An argument's value; long lists are cut."""
    text = "–" if value is None or value == "" else str(value)
    return text if len(text) <= 300 else text[:300] + " …"


def _metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    final = summary.get("final") or {}
    return {name: value for name, value in final.items() if name != "loss" and isinstance(value, int | float)}


def _cards(summary: Mapping[str, Any]) -> str:
    protocols, references = summary.get("protocols") or {}, summary.get("references") or {}
    cards = []
    for name, value in _metrics(summary).items():
        notes = []
        if (protocols.get(name) or {}).get("chance") is not None:
            notes.append(f"chance {protocols[name]['chance']:.3g}")
        notes += [f"{label} {lines[name]:.3g}" for label, lines in references.items() if name in lines]
        note = f'<br><span class="soft">{_text(" · ".join(notes))}</span>' if notes else ""
        cards.append(f'<div class="card"><span>{_text(name)}</span><b>{value:.4f}</b>{note}</div>')
    return f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>Nothing was evaluated.</p>"


def _results(summary: Mapping[str, Any]) -> str:
    protocols, best, references = (summary.get(key) or {} for key in ("protocols", "best", "references"))
    labels = [label for label, lines in references.items() if set(lines) & set(_metrics(summary))]
    rows = []
    for name, value in _metrics(summary).items():
        p, top = protocols.get(name) or {}, best.get(name) or {}
        measured = ", ".join(
            filter(None, [
                f"{p['samples']:,} {p.get('split', '')} images" if p.get("samples") else "",
                f"{p['frozen']} frozen" if p.get("frozen") else "", p.get("note", ""),
            ])
        )  # fmt: skip
        at = f"{shown(top.get('value'))} (epoch {top.get('epoch')})" if top else "–"
        beside = [shown(references[label].get(name)) for label in labels]
        rows.append([name, shown(float(value)), at, shown(p.get("chance")), *beside, measured or "–"])
    head = ["metric", "final", "best", "chance", *labels, "how it was measured"]
    return f"<h2>Results</h2>{table(head, rows)}" if rows else ""


def _is_number(cell: Any) -> bool:
    return str(cell).replace(".", "", 1).replace("-", "", 1).isdigit()


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
