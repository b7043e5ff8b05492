"""The page of one run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitkit.report.html import (
    Html,
    banner,
    document,
    element,
    facts,
    figures,
    join,
    pairs,
    status_chip,
    table,
    value,
)
from vitkit.report.record import (
    Record,
    difference,
    duration,
    number,
    plain,
    pretty,
    shown,
    split_topk,
    standard_error,
)
from vitkit.runs.summary import lower_is_better

MOST_CARDS = 8
MOST_ROWS = 60
STATUS = {
    "interrupted": (
        "warning",
        "This run was stopped before its end",
        "Its numbers are of its last evaluation.",
    ),
    "failed": (
        "error",
        "This run failed",
        "Its numbers are of the last evaluation before; log.txt says more.",
    ),
    "running": (
        "warning",
        "This run has not ended",
        "The page was written meanwhile, or the run was killed.",
    ),
}


def page(record: Record, training: Sequence[Html], evaluation: Sequence[Html], problems: Sequence[str]) -> str:
    """The whole page; `training` and `evaluation` hold figures, `problems` say which are missing and why."""
    body = [
        element(
            "header",
            element("div", element("h1", record.name), status_chip(record), class_="title"),
            element("p", facts(record), class_="facts"),
        ),
        *_banners(record),
        *_section("Results", _cards(record), _results(record)),
        *_section("Training", figures(training) if training else None),
        *_section(
            "Evaluation",
            figures(evaluation) if evaluation else None,
            _problems(problems),
            _evaluations(record),
        ),
        *_section("Data", _data(record)),
        *_section("Arguments and settings", _arguments(record)),
        *_section("To repeat it", _repeat(record)),
    ]
    return document(f"{record.name} · vitkit", join((piece for piece in body if piece), "\n"))


def _section(title: str, *content: Html | None) -> list[Html]:
    filled = [piece for piece in content if piece]
    return [element("section", element("h2", title), *filled)] if filled else []


def _banners(record: Record) -> list[Html]:
    banners = []
    data = record.part("dataset")
    if data.get("fallback_for"):
        asked, used = data["fallback_for"], data.get("name", "another dataset")
        notice = data.get("notice") or f"{asked} could neither be found nor downloaded."
        banners.append(
            banner(
                "alarm",
                f"This is not {asked}: the run used {used} instead",
                notice,
                f"No result on this page is one of {asked}; the reference numbers, where there are any, are.",
            )
        )
    if record.summary.get("status") in STATUS:
        banners.append(banner(*STATUS[record.summary["status"]]))
    return banners


def _headlines(record: Record) -> list[str]:
    """The metrics that get a card: of several k of one evaluation the smallest."""
    names = [name for name, final in record.final.items() if name != "loss" and np.isfinite(final)]
    smallest: dict[str, int] = {}
    for name in names:
        if found := split_topk(name):
            smallest[found[0]] = min(found[1], smallest.get(found[0], found[1]))
    kept = [name for name in names if not (found := split_topk(name)) or smallest[found[0]] == found[1]]
    return kept[:MOST_CARDS]


def _cards(record: Record) -> Html | None:
    values = {name: record.final[name] for name in _headlines(record)}
    if not values and record.losses.get("loss"):
        values = {"loss": float(record.losses["loss"].values[-1])}
    cards = (_card(record, name, value) for name, value in values.items())
    return element("ul", *cards, class_="cards") if values else None


def _card(record: Record, name: str, final: float) -> Html:
    chance, references = record.chance(name), list(record.references(name))
    error = standard_error(name, final, record.protocol(name).get("samples"))
    lines = [element("p", f"chance {plain(chance)}")] if chance is not None else []
    for label, line in references:
        # A reference was measured on the data that the recipe is for.
        comparable = not record.part("dataset").get("fallback_for")
        lines.append(element("p", f"{label} {plain(line)} ", _difference(name, final, line) if comparable else ""))
    best = record.best(name)
    if best is not None and shown(best[0]) != shown(final):
        lines.append(element("p", f"best {shown(best[0])} at epoch {best[1]}"))
    meter = _meter(final, chance, [line for _, line in references]) if chance is not None else ""
    spread = element("small", f"± {shown(error)}", title="one standard error") if error is not None else ""
    return element(
        "li",
        element("div", pretty(name), class_="name"),
        element("div", shown(final), " ", spread, class_="value"),
        meter,
        *lines,
    )


def _meter(final: float, chance: float, references: Sequence[float]) -> Html | str:
    """A bar from 0 to 1 with a tick at chance and one at each reference."""
    if not all(0 <= place <= 1 for place in (final, chance, *references)):
        return ""
    ticks = [element("b", style=f"left:{chance:.2%}")]
    ticks += [element("b", style=f"left:{line:.2%}", class_="reference") for line in references]
    return element("div", element("i", style=f"width:{final:.2%}"), *ticks, class_="meter", aria_hidden="true")


def _difference(name: str, final: float, line: float) -> Html:
    told = difference(final, line)
    better = final < line if lower_is_better(name) else final > line
    return element("span", f"({told})", class_="better" if better else "worse" if final != line else None)


def _results(record: Record) -> Html | None:
    if not record.final:
        return None
    labels = list(dict.fromkeys(label for name in record.final for label, _ in record.references(name)))
    rows = []
    for name, final in record.final.items():
        best, lines = record.best(name), dict(record.references(name))
        reached = f"{shown(best[0])} (epoch {best[1]})" if best else "–"
        against = [plain(lines.get(label)) for label in labels]
        rows.append(
            [
                element("code", name),
                element("b", shown(final)),
                reached,
                plain(record.chance(name)),
                *against,
                _protocol(record, name),
            ]
        )
    rest = element(
        "p",
        "± is one standard error over the samples. Best values are picked by the very numbers they report, "
        "so they flatter: the last evaluation is the result.",
        class_="muted",
    )
    head = ["metric", "last", "best", "chance", *labels, "how it was measured"]
    return Html(table(head, rows, "Results and how each was measured", "told") + rest)


def _protocol(record: Record, name: str) -> str:
    protocol = record.protocol(name)
    if not protocol:
        return "mean over the last epoch's training batches" if name == "loss" else "not said"
    pieces = [f"frozen: {protocol['frozen']}"] if protocol.get("frozen") else []
    if protocol.get("split"):
        pieces.append(f"{protocol['split']} split")
    if number(protocol.get("samples")) >= 0:
        pieces.append(f"{int(protocol['samples']):,} samples")
    if protocol.get("note"):
        pieces.append(str(protocol["note"]))
    return "; ".join(pieces)


def _evaluations(record: Record) -> Html | None:
    """Every evaluation as a table: what the curves show, for those who cannot see them."""
    if not record.metrics:
        return None
    epochs = sorted({float(epoch) for series in record.metrics.values() for epoch in series.epochs})
    columns = [
        dict(zip(series.epochs.tolist(), series.values.tolist(), strict=True)) for series in record.metrics.values()
    ]
    rows = [[f"{epoch:g}", *(shown(column.get(epoch)) for column in columns)] for epoch in epochs[-MOST_ROWS:]]
    left_out = f" (the last {MOST_ROWS} of {len(epochs)})" if len(epochs) > MOST_ROWS else ""
    head = ["epoch", *map(pretty, record.metrics)]
    return element(
        "details",
        element("summary", "Every evaluation in numbers"),
        table(head, rows, f"Evaluations{left_out}"),
    )


def _problems(problems: Sequence[str]) -> Html | None:
    if not problems:
        return None
    return banner("error", "Some pictures could not be drawn", *problems)


def _data(record: Record) -> Html | None:
    data = record.part("dataset")
    if not data:
        return None
    classes, shape = data.get("classes") or [], data.get("shape") or []
    rows: dict[str, Any] = {"name": data.get("name")}
    if data.get("asked") not in (None, data.get("name")):
        rows["asked for"] = data["asked"]
    if shape:
        rows["image shape"] = " × ".join(map(str, shape)) + " (channels × height × width)"
    for split in ("train", "test"):
        if number(data.get(split)) >= 0:
            rows[f"{split} images"] = f"{int(data[split]):,}"
    rows |= {name: data[name] for name in ("source", "licence") if data.get(name)}
    listed = join((element("code", label) for label in classes), ", ")
    if len(classes) > 20:
        listed = element("details", element("summary", f"{len(classes)} classes"), listed)
    cells = [(name, value(item)) for name, item in rows.items()]
    if classes:
        cells.append((f"classes ({len(classes)})", listed))
    return table((), cells, "The data that was really used", "pairs")


def _arguments(record: Record) -> Html | None:
    told = {
        "The recipe's arguments": record.part("arguments"),
        "The runner's settings": record.part("settings"),
    }
    tables = [pairs(values, caption) for caption, values in told.items() if values]
    return element("div", *tables, class_="columns") if tables else None


def _repeat(record: Record) -> Html | None:
    summary, pieces = record.summary, []
    if summary.get("command"):
        pieces.append(element("pre", element("code", summary["command"])))
    timing: dict[str, Any] = {}
    if summary.get("started"):
        timing["started"] = summary["started"]
    if number(summary.get("seconds")) > 0:
        timing["wall time"] = duration(number(summary["seconds"]))
        if losses := record.losses.get("loss"):
            timing["an epoch, evaluation included"] = duration(number(summary["seconds"]) / len(losses.epochs))
    if number(summary.get("images_per_second")) > 0:
        timing["images/s in training"] = f"{number(summary['images_per_second']):,.1f}"
    if summary.get("machine"):
        timing["machine"] = summary["machine"]
    versions = {name: version for name, version in record.part("versions").items() if version}
    tables = [pairs(values, caption) for values, caption in ((timing, "Time"), (versions, "Versions")) if values]
    if tables:
        pieces.append(element("div", *tables, class_="columns", style="margin-top:1rem"))
    return join(pieces) if pieces else None
