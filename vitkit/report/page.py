"""The page of one run: the values that its template shows."""

import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vitkit.console import duration
from vitkit.report.curves import SPLITS
from vitkit.report.formatting import (
    as_float,
    format_constant,
    format_difference,
    format_number,
    split_topk,
    title_of,
)
from vitkit.report.record import Record, base_name
from vitkit.report.templating import Banner, PlotImage, render
from vitkit.runs.directory import LAST

MAX_CARDS = 8
MAX_ROWS = 60
UNINFORMED_TOLERANCE = 0.02
"""A loss within this share of its uninformed value is reported."""
STATUS = {
    "interrupted": ("warning", "This run was stopped before its end", "Its numbers are those of its last evaluation."),
    "failed": ("error", "This run failed", "Its numbers are those of the last evaluation; log.txt has the reason."),
    "running": ("warning", "This run has not ended", "The page shows its state when the page was written."),
    "stopped": (
        "error", "This run stopped without an ending",
        "Its process disappeared: it was killed, or the machine went down. Its numbers are those of its last evaluation.",
    ),
}  # fmt: skip


class Result(NamedTuple):
    """One metric on all splits that it was measured on: the metric's name on each."""

    name: str
    metrics: dict[str, str]

    @property
    def main(self) -> str:
        """The metric on the test split, or else on the split that it was measured on."""
        return self.metrics.get("test") or next(reversed(self.metrics.values()))


def page(record: Record, training: Sequence[PlotImage], evaluation: Sequence[PlotImage], problems: Sequence[str]) -> str:
    """The page with the plots of `training` and `evaluation`; each line in `problems` names a missing plot and the reason."""
    results = results_of(record)
    return render(
        "report.html.j2",
        record=record,
        facts=_facts(record),
        banners=_banners(record),
        cards=_cards(record, results),
        results=_table(record, results),
        training=training,
        evaluation=evaluation,
        problems=Banner("error", "Some figures could not be drawn", tuple(problems)) if problems else None,
        evaluations=_evaluations(record),
        data=_data(record),
        arguments={
            "The recipe's arguments": record.part("arguments"),
            "The runner's settings": record.part("settings"),
        },
        command=record.summary.get("command"),
        origin={"Time": _timing(record), "Versions": {k: v for k, v in record.part("versions").items() if v}},
    )


def results_of(record: Record) -> list[Result]:
    """The metrics of the last evaluation, each with its validation and test values together."""
    results: dict[str, Result] = {}
    for metric in record.final:
        name = base_name(metric) if record.split(metric) == "val" else metric
        results.setdefault(name, Result(name, {})).metrics[record.split(metric)] = metric
    order = ["train", "val", "test"]
    return [
        Result(name, dict(sorted(metrics.items(), key=lambda pair: order.index(pair[0]) if pair[0] in order else 3)))
        for name, metrics in results.values()
    ]


def _facts(record: Record) -> str:
    """One line about the run: data, size, time."""
    data, summary = record.part("dataset"), record.summary
    instead = f" (instead of {data['fallback_for']})" if data.get("fallback_for") else ""
    facts = [f"data: {data['name']}{instead}"] if data.get("name") else []
    if summary.get("seed") is not None:
        facts.append(f"seed {summary['seed']}")
    for name, noun in (("parameters", "parameter"), ("epochs", "epoch"), ("steps", "step")):
        if (count := as_float(summary.get(name))) > 0:
            facts.append(f"{count:,.0f} {noun}{'' if count == 1 else 's'}")
    if (seconds := as_float(summary.get("seconds"))) > 0:
        facts.append(duration(seconds))
    if (speed := as_float(summary.get("images_per_second"))) > 0:
        facts.append(f"{speed:,.0f} images/s")
    return " · ".join(facts)


def _banners(record: Record) -> list[Banner]:
    banners = []
    data = record.part("dataset")
    if data.get("fallback_for"):
        wanted, used = data["fallback_for"], data.get("name", "another dataset")
        notice = str(data.get("notice") or f"{wanted} is not in the store and could not be downloaded.")
        scope = f"No result on this page is a result on {wanted}; only reference numbers are."
        banners.append(Banner("alarm", f"This is not {wanted}: the run used {used} instead", (notice, scope)))
    if record.status in STATUS:
        kind, title, text = STATUS[record.status]
        command = record.summary.get("command")
        resume = f"Resume it with: {command} --out {shlex.quote(str(record.directory))} --resume"
        can_resume = command and record.status != "running" and (record.directory / LAST).exists()
        banners.append(Banner(kind, title, (text, resume) if can_resume else (text,)))
    if stuck := uninformed_losses(record):
        text = "A prediction that uses no information about its input has this loss: so far the model may have learned nothing."
        advice = "Usual causes: too high or too low a learning rate, labels that do not belong to their images, or too few steps."
        banners.append(Banner("error", "The loss is that of an uninformed prediction", (*stuck, text, advice)))
    return banners


def uninformed_losses(record: Record) -> list[str]:
    """A line for the final loss if it lies within 2 % of its uninformed value; for each part where only parts have one."""
    values = {n: v for n in record.losses if (v := record.bound("uninformed", n)) is not None and record.losses[n]}
    names = ["loss"] if "loss" in values else list(values)
    return [
        f"{title_of(name)} {format_number(record.losses[name].last)}, uninformed {format_number(values[name])}."
        for name in names
        if abs(record.losses[name].last - values[name]) <= UNINFORMED_TOLERANCE * abs(values[name])
    ]


def _cards(record: Record, results: Sequence[Result]) -> list[dict[str, Any]]:
    """A card for each metric, or for the loss if there is none; of a top-k metric only for the smallest k."""
    finite = [result for result in results if result.name != "loss" and np.isfinite(record.final[result.main])]
    smallest: dict[str, int] = {}
    for result in finite:
        if topk := split_topk(result.name):
            smallest[topk[0]] = min(topk[1], smallest.get(topk[0], topk[1]))
    chosen = [result for result in finite if not (topk := split_topk(result.name)) or smallest[topk[0]] == topk[1]]
    if not chosen and record.losses.get("loss"):
        value = format_number(record.losses["loss"].last)
        return [{"title": "loss", "split": SPLITS["train"], "value": value, "error": "", "meter": None, "lines": []}]
    return [_card(record, result) for result in chosen[:MAX_CARDS]]


def _card(record: Record, result: Result) -> dict[str, Any]:
    metric, final = result.main, record.final[result.main]
    chance, untrained, references = record.chance(metric), record.untrained(metric), list(record.references(metric))
    lines: list[tuple[str, str, str]] = []  # text, difference, better or worse
    if "val" in result.metrics and metric != result.metrics["val"]:
        lines.append((f"validation {format_number(record.final[result.metrics['val']], record.unit(metric))}", "", ""))
    lines += [(f"chance {format_constant(chance)}", "", "")] if chance is not None else []
    lines += [(f"untrained {format_constant(untrained)}", "", "")] if untrained is not None else []
    for label, value in references:
        # Reference numbers are for the recipe's dataset, not for one that replaces it.
        comparable = not record.part("dataset").get("fallback_for")
        verdict = "" if final == value else "better" if (final > value) == (record.direction(metric) == "max") else "worse"
        lines.append((f"{label} {format_constant(value)}", f"({format_difference(final, value)})" if comparable else "", verdict))
    best = record.best(metric)
    if best is not None and format_number(best[0]) != format_number(final):
        lines.append((f"best {format_number(best[0])} at epoch {best[1]}", "", ""))
    error = record.standard_error(metric)
    ticks = [("", chance), ("untrained", untrained), *(("reference", value) for _, value in references)]
    ticks = [(kind, value) for kind, value in ticks if value is not None and 0 <= value <= 1]
    return {
        "title": title_of(result.name),
        "split": SPLITS.get(record.split(metric), record.split(metric)),
        "value": format_number(final, record.unit(metric)),
        "error": f"± {format_number(error)}" if error is not None else "",
        "meter": (final, ticks) if record.is_proportion(metric) and 0 <= final <= 1 and ticks else None,
        "lines": lines,
    }


def _table(record: Record, results: Sequence[Result]) -> dict[str, Any] | None:
    """The results as a table: a row for each metric, its splits side by side; the training loss stands below."""
    loss = next((result for result in results if result.name == "loss"), None)
    results = [result for result in results if result != loss]
    below = f"Training loss {format_number(record.final['loss'])}, best {_best(record, loss)}; a mean over an epoch." if loss else ""
    if not results:
        return None
    splits = list(dict.fromkeys(split for result in results for split in result.metrics if split))
    splits = sorted(splits, key=lambda split: list(SPLITS).index(split) if split in SPLITS else len(SPLITS))
    unknown = any("" in result.metrics for result in results)
    labels = list(dict.fromkeys(label for result in results for label, _ in record.references(result.main)))
    any_untrained = any(record.untrained(result.main) is not None for result in results)
    rows = []
    for result in results:
        metric, lines = result.main, dict(record.references(result.main))
        unit = record.unit(metric)
        values = [result.metrics.get(split) for split in (*splits, *([""] if unknown else []))]
        rows.append({
            "name": result.name,
            "direction": record.direction(metric),
            "values": [format_number(record.final[name], unit) if name else "–" for name in values],
            "rest": [
                _best(record, result), format_constant(record.chance(metric)),
                *([format_constant(record.untrained(metric))] if any_untrained else []),
                *(format_constant(lines.get(label)) for label in labels), _protocol(record, result),
            ],
        })  # fmt: skip
    words = [*(SPLITS.get(split, split) for split in splits), *(["last"] if unknown else [])]
    head = ["metric", *words, "best", "chance", *(["untrained"] if any_untrained else []), *labels, "how it was measured"]
    return {"head": head, "rows": rows, "has_validation": "val" in splits, "loss": below}


def _best(record: Record, result: Result) -> str:
    """The best value; with a validation split it is the test value at the epoch with the best validation value, if it was measured then."""
    chooser = result.metrics.get("val", result.main)
    best = record.best(chooser)
    if best is None:
        return "–"
    series = record.metrics.get(result.main)
    if chooser != result.main and series is not None and best[1] in series.epochs:
        return f"{format_number(float(series.values[series.epochs == best[1]][-1]))} (epoch {best[1]})"
    return f"{'validation ' if chooser != result.main else ''}{format_number(best[0])} (epoch {best[1]})"


def _protocol(record: Record, result: Result) -> str:
    protocol = record.protocol(result.main)
    if not protocol:
        return "not recorded"
    pieces = [f"frozen: {protocol['frozen']}"] if protocol.get("frozen") else []
    pieces += [f"{SPLITS.get(record.split(result.main), record.split(result.main))} split"] if record.split(result.main) else []
    if as_float(protocol.get("samples")) >= 0:
        pieces.append(f"{as_float(protocol['samples']):,.0f} samples")
    pieces += [str(protocol["note"])] if protocol.get("note") else []
    validation = result.metrics.get("val", result.main)
    if validation != result.main and as_float(record.protocol(validation).get("samples")) >= 0:
        pieces.append(f"validation split: {as_float(record.protocol(validation)['samples']):,.0f} samples")
    return "; ".join(pieces)


def _evaluations(record: Record) -> dict[str, Any] | None:
    """All evaluations as a table, for people who cannot see the curves."""
    if not record.metrics:
        return None
    epochs = sorted({float(epoch) for series in record.metrics.values() for epoch in series.epochs})
    columns = [dict(zip(series.epochs.tolist(), series.values.tolist(), strict=True)) for series in record.metrics.values()]
    rows = [[f"{epoch:g}", *(format_number(column.get(epoch)) for column in columns)] for epoch in epochs[-MAX_ROWS:]]
    cut = f" (the last {MAX_ROWS} of {len(epochs)})" if len(epochs) > MAX_ROWS else ""
    return {"head": ["epoch", *map(title_of, record.metrics)], "rows": rows, "caption": f"Evaluations{cut}"}


def _data(record: Record) -> dict[str, Any] | None:
    data = record.part("dataset")
    if not data:
        return None
    rows: dict[str, Any] = {"name": data.get("name")}
    if data.get("asked") not in (None, data.get("name")):
        rows["requested"] = data["asked"]
    shape, classes = (item if isinstance(item := data.get(name), list) else [] for name in ("shape", "classes"))
    if shape:
        rows["image shape"] = " × ".join(map(str, shape)) + " (channels × height × width)"
    for split, word in SPLITS.items():
        if as_float(data.get(split)) >= 0:
            rows[f"{word} images"] = f"{as_float(data[split]):,.0f}"
    rows |= {name: data[name] for name in ("source", "licence") if data.get(name)}
    return {"rows": rows, "classes": classes}


def _timing(record: Record) -> dict[str, Any]:
    summary, seconds = record.summary, as_float(record.summary.get("seconds"))
    timing: dict[str, Any] = {"started": summary.get("started")}
    if seconds > 0:
        timing["wall time"] = duration(seconds)
        if losses := record.losses.get("loss"):
            timing["an epoch, evaluation included"] = duration(seconds / len(losses.epochs))
    if (speed := as_float(summary.get("images_per_second"))) > 0 and math.isfinite(speed):
        timing["images/s in training"] = f"{speed:,.1f}"
    timing["machine"] = summary.get("machine")
    return {name: value for name, value in timing.items() if value}
