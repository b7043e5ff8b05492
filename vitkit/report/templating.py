"""Pages from Jinja2 templates: every value is escaped, and a page needs no other file."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vitkit.console import duration
from vitkit.report.formatting import format_constant, format_number, title_of
from vitkit.report.style import Plot

PIXELS_PER_INCH = 100
"""CSS pixels; the PNG files have 1.5 times as many, for screens that can show them."""


@dataclass(frozen=True)
class PlotImage:
    """A plot with its PNG data, which the page contains."""

    plot: Plot
    data: bytes

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.data).decode("ascii")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page."""
        width, height = self.plot.figure.get_size_inches()
        return round(PIXELS_PER_INCH * width), round(PIXELS_PER_INCH * height)


@dataclass(frozen=True)
class Banner:
    """A notice at the top of a page; `kind` is alarm, error or warning."""

    kind: str
    title: str
    lines: tuple[str, ...]


def render(template: str, **values: Any) -> str:
    """A template of this package, rendered with values."""
    style = resources.files("vitkit.report").joinpath("page.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(style=Markup(style), **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(str(resources.files("vitkit.report") / "templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": format_number, "constant": format_constant, "title": title_of, "duration": duration, "value": _value,
    }  # fmt: skip
    return environment


def _value(item: Any) -> Any:
    """An argument as a person would type it."""
    if item is None or item in ("", [], {}):
        return Markup('<span class="muted">{}</span>').format("empty" if item == "" else "none")
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, list | tuple):
        return ", ".join(map(str, item))
    if isinstance(item, Mapping):
        return ", ".join(f"{name}={entry}" for name, entry in item.items())
    return item
