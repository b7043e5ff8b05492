"""The pieces that pages are made of; every text is escaped unless it says that it is HTML."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from vitkit.report.record import Record, duration, number
from vitkit.report.style import Plot

PIXELS_PER_INCH = 100
"""On the page; the files have half as many again, for screens that can show them."""


class Html(str):
    """Text that is HTML already."""


def text(value: Any) -> Html:
    """Any value, escaped unless it is `Html`."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(pieces: Iterable[Any], between: str = "") -> Html:
    return Html(between.join(text(piece) for piece in pieces))


def element(tag: str, *content: Any, **attributes: Any) -> Html:
    """`element("p", "1 < 2", class_="note")`; attributes that are None are left out, True stands alone."""
    written = ""
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        written += f" {name}" if value is True else f' {name}="{escape(str(value))}"'
    return Html(f"<{tag}{written}>" if tag == "img" else f"<{tag}{written}>{join(content)}</{tag}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str, class_: str | None = None) -> Html:
    """A table that says what it is, with a header for each row and column; it scrolls where too wide."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    whole = element(
        "table",
        element("caption", caption),
        element("thead", top) if any(head) else "",
        element("tbody", *body),
        class_=class_,
    )
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def pairs(values: Mapping[str, Any], caption: str) -> Html:
    """A table of names and values."""
    return table((), ((element("code", name), value(item)) for name, item in values.items()), caption, "pairs")


def value(item: Any) -> Html:
    """An argument's value as it would be typed."""
    if item is None or item == "":
        return element("span", "none" if item is None else "empty", class_="muted")
    if isinstance(item, bool):
        return text("yes" if item else "no")
    if isinstance(item, list | tuple):
        return text(", ".join(map(str, item)))
    if isinstance(item, Mapping):
        return text(", ".join(f"{name}={entry}" for name, entry in item.items()))
    return text(item)


def picture(plot: Plot, data: bytes) -> Html:
    """A figure with its PNG inside."""
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    width, height = (round(PIXELS_PER_INCH * inches) for inches in plot.figure.get_size_inches())
    return element(
        "figure",
        element("h3", plot.title),
        element("div", element("img", src=source, alt=plot.alt, width=width, height=height), class_="canvas"),
        element("figcaption", plot.caption) if plot.caption else "",
        class_="wide" if plot.wide else None,
    )


def figures(drawn: Sequence[Html]) -> Html:
    """Figures side by side where there is room."""
    return element("div", *drawn, class_="figures")


def banner(kind: str, title: str, *content: Any) -> Html:
    """A notice with a paragraph for each of `content`; `kind` is alarm, error or warning."""
    return element(
        "div",
        element("strong", title),
        *(element("p", line) for line in content),
        class_=f"banner {kind}",
        role="alert",
    )


def status_chip(record: Record) -> Html:
    status = str(record.summary.get("status") or "unknown")
    return element("span", status, class_=f"chip {status if status.isalpha() else 'unknown'}")


def facts(record: Record) -> Html:
    """One line on what was run: data, size, time."""
    data = record.part("dataset")
    instead = f" (instead of {data['fallback_for']})" if data.get("fallback_for") else ""
    pieces = [f"data: {data['name']}{instead}"] if data.get("name") else []
    if record.summary.get("seed") is not None:
        pieces.append(f"seed {record.summary['seed']}")
    if number(record.summary.get("parameters")) > 0:
        pieces.append(f"{int(record.summary['parameters']):,} parameters")
    if number(record.summary.get("epochs")) > 0:
        pieces.append(_counted(record.summary["epochs"], "epoch"))
    if number(record.summary.get("steps")) > 0:
        pieces.append(_counted(record.summary["steps"], "step"))
    if number(record.summary.get("seconds")) > 0:
        pieces.append(duration(number(record.summary["seconds"])))
    if number(record.summary.get("images_per_second")) > 0:
        pieces.append(f"{number(record.summary['images_per_second']):,.0f} images/s")
    return text(" · ".join(pieces))


def _counted(count: Any, what: str) -> str:
    return f"{int(count):,} {what}{'s' if int(count) != 1 else ''}"


def document(title: str, body: Html) -> str:
    """A whole page that needs nothing but itself."""
    style = resources.files("vitkit.report").joinpath("page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
