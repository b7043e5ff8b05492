"""The model card of a run, which a visitor of its Hub repository reads: `card.md.j2`, filled with the records of the run."""

import ast
import hashlib
import html
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from vitkit.console import duration
from vitkit.report.formatting import as_float, format_constant, format_number, split_topk, title_of
from vitkit.report.record import Record, read_record

TASKS = {
    "text": "zero-shot-image-classification",
    "decoder": "unconditional-image-generation",
    "classifier": "image-classification",
    "backbone": "image-feature-extraction",
}
"""The Hub's name of a model's task, by the modules that it was saved with; the first one present counts."""
MAX_LISTED_CLASSES = 20
LAST_PLOTS = ("losses", "pace", "statistic_")
SEAL = "<!-- Written by vitkit push, which replaces it unless something above this line was edited. sha256:{} -->"
SEALED = re.compile(r"(?s)(.*\n)<!-- Written by vitkit push[^\n]* sha256:([0-9a-f]{64}) -->\s*")


def write_card(run: Path, repo: str, config: Mapping[str, Any], plots: Sequence[str], licence: str) -> str:
    """The card of a run, with front matter and seal.

    `repo` is the repository's id, `config` the saved model's, `plots` the names of the images beside the card, `licence` that of
    the weights, as the Hub writes it.
    """
    record = read_record(run)
    summary, data, modules = record.summary, record.part("dataset"), config["modules"]
    metrics = {name: value for name, value in record.final.items() if name != "loss" and value == value}
    references = list(dict.fromkeys(label for name in metrics for label, _ in record.references(name)))
    packages = sorted({(part["distribution"], part.get("version")) for part in modules.values()})
    text = _environment().from_string(resources.files("vitkit.hub").joinpath("card.md.j2").read_text("utf-8")).render(
        metadata=_metadata(record, repo, config, metrics, licence).to_yaml(),
        name=repo.rpartition("/")[2], repo=repo, data=data, status=str(summary.get("status")), recipe=record.name,
        docstring=_docstring(run / "recipe.py"), has_recipe=(run / "recipe.py").is_file(), modules=modules,
        parameters=int(max(0.0, as_float(summary.get("parameters")))) if summary.get("parameters") else 0,
        classes=[str(name) for name in config.get("classes") or []], max_classes=MAX_LISTED_CLASSES,
        encodes="backbone" in modules, shape=config["preprocessing"].get("shape"),
        packages=shlex.join(f"{name}=={version}" if version else name for name, version in packages),
        references=references, results=[_result(record, name, value, references) for name, value in metrics.items()],
        epochs=int(as_float(summary["epochs"])) if as_float(summary.get("epochs")) >= 1 else 0,
        facts=_facts(record), arguments=record.part("arguments"),
        plots=sorted(plots, key=lambda name: (Path(name).stem.startswith(LAST_PLOTS), name)),
    )  # fmt: skip
    return sealed(text)


def sealed(text: str) -> str:
    """A card with a last line that shows whether the card was edited later."""
    text = text.rstrip() + "\n\n"
    return f"{text}{SEAL.format(_digest(text))}\n"


def is_unedited(text: str) -> bool:
    """Whether a card was written by `sealed` and not edited since; line ends and trailing space do not count."""
    match = SEALED.fullmatch(text.replace("\r\n", "\n"))
    return match is not None and _digest(match[1]) == match[2]


def _metadata(
    record: Record, repo: str, config: Mapping[str, Any], metrics: Mapping[str, float], licence: str
) -> ModelCardData:
    """The front matter, with an `EvalResult` for each metric of the last evaluation."""
    data, modules = record.part("dataset"), config["modules"]
    others = {part["distribution"] for part in modules.values()} - {"vitkit"}
    names = [*dict.fromkeys(part["name"] for part in modules.values()), *sorted(others)]
    task = next((task for name, task in TASKS.items() if name in modules), None)
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=data.get("hub_id") or data["name"],
            dataset_name=data["name"],
            dataset_split=record.protocol(name).get("split"),
            metric_type=_hub_metric(name),
            metric_name=title_of(name),
            metric_value=round(value, 6),
            metric_args={k: v for k, v in record.protocol(name).items() if k != "split" and v not in ("", None)},
        )
        for name, value in metrics.items()
        if data.get("name")
    ]
    return ModelCardData(
        library_name="vitkit",
        license=licence,
        pipeline_tag=task,
        tags=["vitkit", "representation-learning", record.name, *names],
        datasets=[data["hub_id"]] if data.get("hub_id") else None,
        metrics=sorted({_hub_metric(name) for name in metrics}) or None,
        eval_results=results or None,
        model_name=repo.rpartition("/")[2] if results else None,
    )


def _result(record: Record, name: str, value: float, references: Sequence[str]) -> list[str]:
    """The cells of a metric's row."""
    error, lines = record.standard_error(name), dict(record.references(name))
    number = f"**{format_number(value)}**" + (f" ± {error:.2g}" if error is not None else "")
    constants = [format_constant(lines.get(label)) for label in references]
    return [title_of(name), number, format_constant(record.chance(name)), *constants, _protocol(record.protocol(name))]


def _facts(record: Record) -> dict[str, str]:
    """Facts of the training, by name; facts that were not recorded are left out."""
    summary, settings, data = record.summary, record.part("settings"), record.part("dataset")
    counts = [f"{int(data[split]):,} {split}" for split in ("train", "val", "test") if as_float(data.get(split)) >= 1]
    seconds, speed = as_float(summary.get("seconds")), as_float(summary.get("images_per_second"))
    machine = [str(summary["machine"])] if summary.get("machine") else []
    machine += [f"{key} {settings[key]}" for key in ("device", "precision", "processes") if settings.get(key)]
    time = f"{duration(seconds)}{f', {speed:,.0f} images/s in training' if speed > 0 else ''}" if seconds > 0 else ""
    facts = {
        "command": _code(_command(str(summary["command"]))) if summary.get("command") else "",
        "seed": str(summary.get("seed", "")),
        "dataset": f"{data.get('name')} ({' + '.join(counts)} images)" if counts else "",
        "hardware": ", ".join(machine),
        "time": time,
        "versions": ", ".join(f"{name} {version}" for name, version in record.part("versions").items() if version),
    }
    return {name: value for name, value in facts.items() if value}


def _protocol(protocol: Mapping[str, Any]) -> str:
    parts = [f"frozen {protocol['frozen']}"] if protocol.get("frozen") else []
    if as_float(protocol.get("samples")) >= 0:
        parts.append(f"{int(protocol['samples']):,} {protocol.get('split') or ''} samples".replace("  ", " "))
    if protocol.get("note"):
        parts.append(str(protocol["note"]))
    return "; ".join(parts) or "not recorded"


def _command(command: str) -> str:
    """The command with `recipe.py` in place of the recipe's path on the machine that it ran on."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join("recipe.py" if word.endswith(".py") and place == 2 else word for place, word in enumerate(words))


def _docstring(recipe: Path) -> str:
    """The docstring of a recipe; the recipe is parsed, never run."""
    try:
        return ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return ""


def _hub_metric(metric: str) -> str:
    """The Hub's name of a metric: a top-k is an accuracy, others keep theirs."""
    return "accuracy" if split_topk(metric) else metric


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _environment() -> Environment:
    """Markdown has no autoescape: every recorded value goes through `text` or `code`."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {"text": _text, "code": _code, "stem": lambda name: Path(name).stem, "title_of": title_of}
    return environment


def _text(value: Any) -> str:
    """A value on one line, with HTML, links and the borders of table cells escaped."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([|\[\]`])", r"\\\1", line)


def _code(value: Any) -> str:
    """A value on one line as a code span; a bar is escaped, because it ends a table cell even in code."""
    line = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


__all__ = ["is_unedited", "sealed", "write_card"]
