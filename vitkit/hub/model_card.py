"""The model card of a run: what a visitor of its Hub repository reads, written from what the run recorded."""

import ast
import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitkit.report.formatting import as_float, format_constant, format_duration, format_number, split_topk, title_of
from vitkit.report.record import read_record

TASKS = {
    "text": "zero-shot-image-classification",
    "decoder": "unconditional-image-generation",
    "classifier": "image-classification",
    "backbone": "image-feature-extraction",
}
"""The Hub's name of what a model can do, by the modules that it was saved with; the first that is there counts."""
MOST_CLASSES = 20
TRAINING = ("losses", "pace", "statistic_")
SEAL = "<!-- Written by vitkit push, which writes it anew as long as nothing above this line is edited. sha256:{} -->"
SEALED = re.compile(r"(?s)(.*\n)<!-- Written by vitkit push[^\n]* sha256:([0-9a-f]{64}) -->\s*")


class Card:
    """What a run's card says: `metadata` for its front matter, `results` for its model index, `body` in Markdown.

    `repo` is the repository's id, `config` the saved model's, `plots` the names of the pictures beside the card,
    `licence` that of the weights, as the Hub writes it.
    """

    def __init__(self, run: Path, repo: str, config: Mapping[str, Any], plots: Sequence[str], licence: str) -> None:
        self.record, self.repo, self.config, self.plots = read_record(run), repo, config, plots
        self.recipe = run / "recipe.py"
        self.data = self.record.part("dataset")
        self.task = next((task for name, task in TASKS.items() if name in config["modules"]), None)
        self.metrics = {n: value for n, value in self.record.final.items() if n != "loss" and value == value}
        self.metadata: dict[str, Any] = {
            "library_name": "vitkit",
            "license": licence,
            "pipeline_tag": self.task,
            "tags": ["vitkit", "representation-learning", self.record.name, *_names(config)],
            "datasets": [self.data["hub_id"]] if self.data.get("hub_id") else None,
            "metrics": sorted({_kind(name) for name in self.metrics}) or None,
        }

    @property
    def results(self) -> list[dict[str, Any]]:
        """One entry a metric of the last evaluation, with the fields of the Hub's `EvalResult`."""
        if not self.data.get("name"):
            return []
        return [
            {
                "task_type": self.task or "other",
                "dataset_type": self.data.get("hub_id") or self.data["name"],
                "dataset_name": self.data["name"],
                "dataset_split": self.record.protocol(name).get("split"),
                "metric_type": _kind(name),
                "metric_name": title_of(name),
                "metric_value": round(value, 6),
                "metric_args": {
                    k: v for k, v in self.record.protocol(name).items() if k != "split" and v not in ("", None)
                },
            }
            for name, value in self.metrics.items()
        ]

    @property
    def body(self) -> str:
        """The card below its front matter."""
        sections = {
            "": [f"# {self.repo.rpartition('/')[2]}", *self._warnings(), *self._what()],
            "Use it": self._use(),
            "Results": self._results(),
            "How it was trained": self._training(),
            "Pictures": self._pictures(),
            "Limits": self._limits(),
            "Files": self._files(),
        }
        parts = ([f"## {title}", *lines] if title else lines for title, lines in sections.items() if lines)
        return "\n\n".join(line for lines in parts for line in lines) + "\n"

    def _warnings(self) -> list[str]:
        said = []
        if self.data.get("fallback_for"):
            asked, used = self.data["fallback_for"], self.data.get("name")
            said.append(
                f"> [!WARNING]\n> **This is not a model of {asked}.** {asked} could not be had when it was trained: "
                f"it saw **{used}** instead, and every number below is of {used}."
            )
        status = self.record.summary.get("status")
        if status != "finished":
            said.append(
                f"> [!WARNING]\n> **Its training did not end** (status: {status}). The numbers are of its last evaluation."
            )
        return said

    def _what(self) -> list[str]:
        used = [f"{name} `{data['name']}`" for name, data in self.config["modules"].items()]
        size = as_float(self.record.summary.get("parameters"))
        facts = f"A vision-transformer model trained with `{self.record.name}`" + (
            f" on {self.data['name']}" if self.data.get("name") else ""
        )
        facts += f": {', '.join(used)}" + (f"; {int(size):,} parameters." if size > 0 else ".")
        classes = [str(name) for name in self.config.get("classes") or []]
        listed = ", ".join(classes) if len(classes) <= MOST_CLASSES else ""
        said = [f"{len(classes)} classes{': ' if listed else ', named in `config.json`'}{listed}."] if classes else []
        return [*_docstring(self.recipe), facts, *said]

    def _use(self) -> list[str]:
        encodes = "backbone" in self.config["modules"]
        shape = self.config["preprocessing"].get("shape") or ("c", "h", "w")
        needs = sorted({(d["distribution"], d.get("version")) for d in self.config["modules"].values()})
        install = shlex.join(f"{name}=={version}" if version else name for name, version in needs)
        use = "features = model.encode_image(model.preprocess(images))  # (n, d)" if encodes else "print(model)"
        code = f'```python\nimport vitkit\n\nmodel = vitkit.load("{self.repo}")\n{use}\n```'
        images = (
            f"`images` are Pillow images, or uint8 of shape (n, {shape[0]}, h, w); they are brought to "
            f"{shape[1]}×{shape[2]} pixels and normalised as in training. "
            if encodes and self.config["preprocessing"]
            else ""
        )
        return [
            code,
            f"{images}It was saved with `{install}`. Loading runs no code from this repository: the modules are built "
            f"from registered names and `config.json`, the weights are read from safetensors.",
        ]

    def _results(self) -> list[str]:
        if not self.metrics:
            return []
        record = self.record
        labels = list(dict.fromkeys(label for name in self.metrics for label, _ in record.references(name)))
        rows = []
        for name, value in self.metrics.items():
            error = record.standard_error(name)
            lines = dict(record.references(name))
            told = f"**{format_number(value)}**" + (f" ± {error:.2g}" if error is not None else "")
            against = [format_constant(lines.get(label)) for label in labels]
            rows.append([title_of(name), told, format_constant(record.chance(name)), *against, _protocol(record.protocol(name))])
        table = _table(["metric", "value", "chance", *labels, "how it was measured"], rows)
        notes = f"Of the last evaluation{self._where()}, not of the best one. ± is one standard error over the samples."
        if labels:
            notes += f" For reference, not measured here: {', '.join(labels)}"
            asked = self.data.get("fallback_for")
            notes += f", of {asked} and not to be compared with the others." if asked else "."
        return [table, notes]

    def _where(self) -> str:
        epochs = as_float(self.record.summary.get("epochs"))
        return f" (epoch {int(epochs)})" if epochs >= 1 else ""

    def _training(self) -> list[str]:
        summary, settings = self.record.summary, self.record.part("settings")
        command = _command(str(summary.get("command") or ""))
        counts = [f"{int(self.data[s]):,} {s}" for s in ("train", "test") if as_float(self.data.get(s)) >= 0]
        seconds, speed = as_float(summary.get("seconds")), as_float(summary.get("images_per_second"))
        machine = [str(summary[key]) for key in ("machine",) if summary.get(key)]
        machine += [f"{key} {settings[key]}" for key in ("device", "precision", "processes") if settings.get(key)]
        versions = [f"{name} {version}" for name, version in self.record.part("versions").items() if version]
        facts = {
            "command": f"`{command}`" if command else "",
            "seed": str(summary.get("seed", "")),
            "dataset": f"{self.data.get('name')} ({' + '.join(counts)} images)" if counts else "",
            "hardware": ", ".join(machine),
            "time": format_duration(seconds) + (f", {speed:,.0f} images/s in training" if speed > 0 else "")
            if seconds > 0
            else "",
            "versions": ", ".join(versions),
        }
        rows = [[name, told] for name, told in facts.items() if told]
        arguments = [[f"`{name}`", f"`{value}`"] for name, value in self.record.part("arguments").items()]
        more = f"<details><summary>All arguments</summary>\n\n{_table(['argument', 'value'], arguments)}\n\n</details>"
        return [_table(["", ""], rows), *([more] if arguments else [])] if rows else []

    def _pictures(self) -> list[str]:
        names = sorted(self.plots, key=lambda name: (Path(name).stem.startswith(TRAINING), name))
        cells = [f"![{title_of(Path(name).stem)}]({name})" for name in names]
        titles = [title_of(Path(name).stem) for name in names]
        pairs = [(titles[place : place + 2], cells[place : place + 2]) for place in range(0, len(cells), 2)]
        return [_table([*title, ""][:2], [[*cell, ""][:2]]) for title, cell in pairs]

    def _limits(self) -> list[str]:
        data, said = self.data, []
        if data.get("fallback_for"):
            said.append(
                f"It was trained on {data.get('name')} in place of {data['fallback_for']}, which could not be had."
            )
        if data.get("name"):
            what = f"Its numbers are of {data['name']} alone" if self.metrics else "No evaluation of it was recorded"
            said.append(
                f"{what}; how it does on other images has not been measured."
                + (f" Source of the data: {data['source']}." if data.get("source") else "")
                + (f" Licence of the data: {data['licence']}." if data.get("licence") else "")
            )
        said.append("One run with one seed: how much the numbers move from seed to seed is not known from it.")
        return ["\n".join(f"- {line}" for line in said)]

    def _files(self) -> list[str]:
        recipe = (
            "- `recipe.py`: the recipe that was run, as text. It is code: read it before you run it.\n"
            if self.recipe.is_file()
            else ""
        )
        return [
            "- `model.safetensors`, `config.json`: the model\n"
            f"{recipe}"
            "- `summary.json`, `metrics.csv`, `losses.csv`, `plots/`: what the run recorded\n\n"
            f"`vitkit pull {self.repo}` fetches them all."
        ]


def sealed(text: str) -> str:
    """The card with a last line that tells whether anybody has edited it since."""
    text = text.rstrip() + "\n\n"
    return f"{text}{SEAL.format(_digest(text))}\n"


def is_unedited(text: str) -> bool:
    """Whether a card was written here and stands as it was written; line ends and space at the end do not count."""
    found = SEALED.fullmatch(text.replace("\r\n", "\n"))
    return found is not None and _digest(found[1]) == found[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _names(config: Mapping[str, Any]) -> list[str]:
    modules = config["modules"].values()
    others = {data["distribution"] for data in modules} - {"vitkit"}
    return [*dict.fromkeys(data["name"] for data in modules), *sorted(others)]


def _kind(metric: str) -> str:
    """The Hub's name of a metric: a top-k is an accuracy, others keep theirs."""
    return "accuracy" if split_topk(metric) else metric


def _protocol(protocol: Mapping[str, Any]) -> str:
    pieces = [f"frozen {protocol['frozen']}"] if protocol.get("frozen") else []
    if as_float(protocol.get("samples")) >= 0:
        pieces.append(f"{int(protocol['samples']):,} {protocol.get('split') or ''} samples".replace("  ", " "))
    if protocol.get("note"):
        pieces.append(str(protocol["note"]))
    return "; ".join(pieces) or "not said"


def _command(command: str) -> str:
    """The command with the recipe's copy in place of its path, which is nobody else's."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join("recipe.py" if word.endswith(".py") and place == 2 else word for place, word in enumerate(words))


def _docstring(recipe: Path) -> list[str]:
    """The recipe's own words about itself; it is parsed, never run."""
    try:
        return [ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""]
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = [_cell(cell) for cell in head]
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


__all__ = ["Card", "is_unedited", "sealed"]
