"""A recipe: a Python file whose `main(run, ...)` signature is its configuration.

The typed keyword arguments of `main` with their defaults are the flags of `vitkit run FILE`. The docstring of `main` is their
help, and a text in `Annotated[int, "blocks in the encoder"]` is the help of one flag. Some parts of a recipe make more flags:

- A parameter annotated `vitkit.contracts.Dataset`: `--dataset NAME` and `--dataset-arg NAME=VALUE`. `main` gets the dataset.
  `DATASET = "mnist"` in the file names the recipe's own dataset, the one that `--dataset auto` takes.
- A parameter annotated `vitkit.Component`, `projector` for example: `--projector NAME` and `--projector-arg NAME=VALUE`.
- `PRESETS = {"quick": {}, "full": {"epochs": 50}}`: `--preset`, for the flags that are not given. The defaults in the signature are
  the first preset. `auto` takes the preset named as the dataset if there is one, else the first.
- `ALIASES = {"emb_dim": "embed_dim", "objective": {"seed": "reference"}}`: earlier names of flags and of their values. With
  `"margin": "triplet.margin"` the flag `--margin 0.3` is `--triplet-arg margin=0.3`; with `"hierarchical": "encoder.depths=all"`
  the flag `--hierarchical` is `--encoder-arg depths=all`, and `--no-hierarchical` is ignored. With
  `"temperature": {"fixed": "", "learned": "loss.learned=true"}`, `--temperature learned` is `--loss-arg learned=true`.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_type_hints

from vitkit.component_arguments import fits
from vitkit.contracts import Dataset
from vitkit.errors import RecipeError, nearest
from vitkit.registry import Component
from vitkit.training.flags import SUPPORTED, Flag, can_be_flag, parse_arguments, plain, split_annotation, typed
from vitkit.training.recipe_modules import LocalModules

HELP = frozenset({"help"})
"""`--help` belongs to the command line itself."""
DEFAULT_DATASET = "digits"


class Recipe:
    """A recipe file, read and checked: its path, its `main` and its flags.

    `source` is the file's content, read from `path` if not given. Runs are kept under `name`, by default the file's name without
    `.py`. Raises `RecipeError` for a file that is missing or does not run, for a missing `main`, an argument of `main` that cannot
    be a flag, and for constants that do not fit `main`.
    """

    def __init__(
        self, path: str | Path, *, reserved: frozenset[str] = frozenset(), name: str = "", source: bytes | None = None
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.stem
        _check_path(self.path)
        self.source = self.path.read_bytes() if source is None else source
        self.modules = LocalModules(self.path)
        with self.modules.importable():
            module = _load(self.path, self.source)
        self.main = _main(self.path, module)
        self.own_dataset = str(getattr(module, "DATASET", DEFAULT_DATASET))
        self._where = f"main in {self.path}"
        self._parameters = _parameters(self._where, self.main)
        self.presets = self._read_presets(getattr(module, "PRESETS", {}))
        self.flags = self._make_flags(reserved | HELP)
        self.aliases: dict[str, Any] = getattr(module, "ALIASES", {})
        self._check_aliases()

    @property
    def help(self) -> str:
        """The docstrings of the file and of `main`."""
        module = sys.modules.get(self.main.__module__)
        parts = [inspect.getdoc(module) if module else None, inspect.getdoc(self.main)]
        return "\n\n".join(part for part in parts if part)

    @property
    def preset_flags(self) -> set[str]:
        """Names of the flags that a preset may set. Their value is None when they are not given."""
        return {name for preset in self.presets.values() for name in preset}

    def run(self, run: Any, requested: Mapping[str, Any]) -> None:
        """Call `main` with a run and the values of its flags, None for a flag of `preset_flags` that was not given.

        The dataset is built, the preset chosen and the components named before `main` is called. The resolved values are recorded
        in `run.arguments`.
        """
        with self.modules.importable():
            self.main(run, **self._resolve(run, dict(requested)))

    def rewrite(self, arguments: Sequence[str]) -> list[str]:
        """The words of a command line, with earlier names of flags and values replaced by the current ones."""
        words: list[str] = []
        flag = ""  # the flag whose value is the next word
        for word in arguments:
            if not word.startswith("--"):
                words += self._moved(flag, word) if self._has_moved(flag) else [self._value(flag, word)]
                flag = ""
                continue
            negated = word.startswith("--no-") and word[5:].replace("-", "_") in self.aliases
            prefix = "--no-" if negated else "--"
            dashed, equals, value = word[len(prefix) :].partition("=")
            old = dashed.replace("-", "_")
            if self._has_moved(old):
                is_switch = isinstance(self.aliases[old], str) and "=" in self.aliases[old]
                words += self._moved(old, value) if equals or (is_switch and not negated) else []
                flag = "" if equals or is_switch else old
                continue
            flag = self._name(old)
            words.append(f"{prefix}{dashed if flag == old else _dashed(flag)}{equals}{self._value(flag, value)}")
        return words

    def rename(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded values of flags under their current names, with earlier values replaced by the current ones."""
        renamed: dict[str, Any] = {}
        for old, value in recorded.items():
            if self._has_moved(old):
                text = value if isinstance(value, str) else json.dumps(value)
                moved = [] if value is None or value is False else self._moved(old, text)
                given: dict[str, Any] = {moved[0][2:].replace("-", "_"): [moved[1]]} if moved else {}
            else:
                name = self._name(old)
                given = {name: self._value(name, value) if isinstance(value, str) else value}
            for name, new in given.items():
                earlier = renamed.get(name)
                renamed[name] = [*earlier, *new] if isinstance(earlier, list) and isinstance(new, list) else new
        return renamed

    def _has_moved(self, old: str) -> bool:
        """Whether an earlier flag is now an argument of a component."""
        alias = self.aliases.get(old)
        return "." in alias if isinstance(alias, str) else isinstance(alias, Mapping) and old not in self.flags

    def _moved(self, old: str, value: str) -> list[str]:
        """The words for an earlier flag that is now an argument of a component: `--loss-arg NAME=VALUE`, or none."""
        alias = self.aliases[old]
        target = str(alias.get(value, "")) if isinstance(alias, Mapping) else alias
        component, _, argument = target.partition(".")
        return [f"--{_dashed(component)}-arg", argument if "=" in argument else f"{argument}={value}"] if component else []

    def _name(self, name: str) -> str:
        alias = self.aliases.get(name)
        return alias if isinstance(alias, str) else name

    def _value(self, flag: str, value: str) -> str:
        values = self.aliases.get(flag)
        return str(values.get(value, value)) if isinstance(values, Mapping) else value

    def _read_presets(self, presets: Any) -> dict[str, dict[str, Any]]:
        """`PRESETS`, checked; empty for a recipe whose `main` takes `preset` and resolves it."""
        if not presets or "preset" in self._parameters:
            return {}
        where = f"PRESETS in {self.path}"
        if not isinstance(presets, dict) or not all(isinstance(values, dict) for values in presets.values()):
            raise RecipeError(f"{where} is {presets!r:.80}; expected a dict of dicts, e.g. {{'quick': {{'epochs': 5}}}}")
        for preset, values in presets.items():
            for name, value in values.items():
                parameter = self._parameters.get(name)
                if parameter is None:
                    near = nearest(name, self._parameters) or f"; arguments: {', '.join(self._parameters)}"
                    raise RecipeError(f"{where}: {preset!r} sets {name!r}, which main does not take{near}")
                if parameter.default is parameter.empty:
                    raise RecipeError(f"{where}: {preset!r} sets {name!r}, which has no default; give it one in main")
                hint, _ = split_annotation(parameter.annotation)
                if not (isinstance(value, Component) if hint is Component else fits(value, hint)):
                    raise RecipeError(
                        f"{where}: {preset!r} sets {name} to {value!r:.80}; expected {inspect.formatannotation(hint)}"
                    )
        return presets

    def _make_flags(self, reserved: frozenset[str]) -> dict[str, Flag]:
        flags: dict[str, Flag] = {}
        self._dataset = self._data_parameter()
        self._components: dict[str, Component] = {}
        if self._dataset:
            _, text = split_annotation(self._parameters[self._dataset].annotation)
            auto = self.own_dataset
            if auto != DEFAULT_DATASET:
                auto += f", or {DEFAULT_DATASET} if it is not available"
            flags["dataset"] = Flag(str, "auto", f"{text or 'a registered or imported dataset'}; auto: {auto}", "NAME")
            flags["dataset_arg"] = Flag(list[str], [], "an argument for the dataset; may be repeated", "NAME=VALUE")
        if self.presets:
            first = next(iter(self.presets))
            by_dataset = "the preset with the name of the dataset if there is one, else " if self._dataset else ""
            text = f"values for flags that you do not set; auto: {by_dataset}{first}"
            flags["preset"] = Flag(Literal[("auto", *self.presets)], "auto", text)
        for name, parameter in self._parameters.items():
            if name == self._dataset:
                continue
            made = self._component_flags(name, parameter) if _is_component(parameter) else {name: self._flag(name, parameter)}
            taken = next((new for new in made if new in flags or (new != name and new in self._parameters)), None)
            if taken is not None:
                raise RecipeError(f"{self._where}: the runner makes the flag --{_dashed(taken)}; rename the argument {taken!r}")
            flags |= made
        for name in flags.keys() & reserved:
            raise RecipeError(f"{self._where}: --{_dashed(name)} belongs to every run already; rename {name!r}")
        return flags

    def _data_parameter(self) -> str:
        """The name of the parameter that takes the dataset, or an empty text."""
        names = [name for name, p in self._parameters.items() if split_annotation(p.annotation)[0] is Dataset]
        if len(names) > 1:
            raise RecipeError(f"{self._where}: {' and '.join(names)} are datasets; the runner builds one, build others in main")
        return names[0] if names else ""

    def _flag(self, name: str, parameter: inspect.Parameter) -> Flag:
        hint, text = split_annotation(parameter.annotation)
        if not can_be_flag(hint):
            raise RecipeError(
                f"{self._where}: argument {name!r} has the type {inspect.formatannotation(parameter.annotation)}, "
                f"which cannot be a flag; use {SUPPORTED}, vitkit.Component or vitkit.contracts.Dataset"
            )
        return Flag(hint, parameter.default, text, default_text=self._defaults(name, parameter.default))

    def _component_flags(self, name: str, parameter: inspect.Parameter) -> dict[str, Flag]:
        component = parameter.default
        if not isinstance(component, Component):
            raise RecipeError(
                f"{self._where}: argument {name!r} needs a default component, e.g. {name}: Component = Component('head', 'mlp')"
            )
        self._components[name] = component
        _, text = split_annotation(parameter.annotation)
        text = f"{text} (a registered {component.kind})" if text else f"a registered {component.kind}"
        defaults = " ".join(f"{key}={plain(value)}" for key, value in component.kwargs.items())
        repeated = f"an argument for --{_dashed(name)}; may be repeated"
        return {
            name: Flag(str, component.name, text, "NAME", self._defaults(name, component)),
            f"{name}_arg": Flag(list[str], [], repeated, "NAME=VALUE", defaults or None),
        }

    def _defaults(self, name: str, default: Any) -> str | None:
        """The default of a flag beside the values that presets give it, or None for a flag that no preset sets."""
        if name not in self.preset_flags:
            return None
        first, *others = self.presets.items()
        texts = [_text(first[1].get(name, default))]
        texts += [f"preset {preset}: {_text(values[name])}" for preset, values in others if name in values]
        return "; ".join(texts)

    def _check_aliases(self) -> None:
        where = f"ALIASES in {self.path}"
        for name, alias in self.aliases.items():
            aliases = [alias] if isinstance(alias, str) else list(alias.values()) if self._has_moved(name) else [name]
            for target in aliases:
                component, dot, _ = str(target).partition(".")
                target = f"{component}_arg" if dot else str(target)
                if target and target not in self.flags:
                    raise RecipeError(f"{where}: {target!r} is not a flag{nearest(target, self.flags)}")
            if isinstance(alias, str) and name in self.flags:
                raise RecipeError(f"{where}: {name!r} is a flag already; an alias is an earlier name")

    def _resolve(self, run: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `main`."""
        resolved: dict[str, Any] = {}
        if self._dataset:
            arguments = parse_arguments(values.pop("dataset_arg", []))
            resolved[self._dataset] = run.dataset(values.pop("dataset", "auto"), default=self.own_dataset, **arguments)
        preset: Mapping[str, Any] = {}
        if self.presets:
            name = values.pop("preset", "auto")
            if name == "auto":
                dataset = resolved[self._dataset].name if self._dataset else ""
                name = dataset if dataset in self.presets else next(iter(self.presets))
            preset = self.presets[name]
            run.arguments["preset"] = name
        for name, parameter in self._parameters.items():
            if name == self._dataset:
                continue
            value = values.get(name)
            if name in self._components:
                default = preset.get(name, self._components[name])
                # The recipe's own component, by its short name too: another distribution may register that name.
                value = default.name if value in (None, default.name.rpartition(":")[2]) else value
                kwargs = default.kwargs if value == default.name else {}
                resolved[name] = Component(default.kind, value, **{**kwargs, **parse_arguments(values.get(f"{name}_arg") or [])})
            else:
                if value is None and name in self.preset_flags:
                    value = preset.get(name, parameter.default)
                resolved[name] = value
            run.arguments[name] = plain(value)
        return resolved


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise RecipeError(f"{path} is a directory; give the recipe's .py file{_beside(path)}")
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}{_beside(path.parent)}")
    if path.suffix != ".py":
        raise RecipeError(f"{path} is not a Python file; a recipe is a .py file with a main(run, ...)")


def _beside(folder: Path) -> str:
    files = sorted(str(file) for file in folder.glob("*.py")) if folder.is_dir() else []
    files = files or sorted(str(file) for file in Path("recipes").glob("*.py"))
    return f"; there are {', '.join(files[:12])}" if files else ""


def _load(path: Path, source: bytes) -> ModuleType:
    """Run a recipe's source as a module."""
    name = f"vitkit_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, enums and string annotations look up their module
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except SyntaxError as error:
        raise RecipeError(
            f"{error.filename or path}:{error.lineno}: syntax error: {error.msg}: {(error.text or '').strip()}"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a recipe may raise anything, including SystemExit
        raise RecipeError(
            f"{path} cannot be read: {type(error).__name__}: {error}; `vitkit --debug run` shows where"
        ) from error
    return module


def _main(path: Path, module: ModuleType) -> Callable[..., Any]:
    main = getattr(module, "main", None)
    if not inspect.isfunction(main):
        raise RecipeError(f"{path} defines no function main(run, ...); a recipe's main is what `vitkit run` calls")
    return main


def _parameters(where: str, main: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of `main` after `run`, with resolved annotations."""
    parameters = list(inspect.signature(main).parameters.values())
    if not parameters or parameters[0].name != "run":
        given = f"begins with the parameter {parameters[0].name!r}" if parameters else "has no parameters"
        raise RecipeError(f"{where} {given}; expected `run` as the first one")
    try:
        hints = get_type_hints(main, include_extras=True)
    except NameError as error:
        raise RecipeError(f"{where} has an annotation that cannot be resolved: {error}") from None
    for parameter in parameters[1:]:
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise RecipeError(f"{where}: {parameter} cannot be a flag; give each argument a name, type and default")
        if name not in hints:
            raise RecipeError(f"{where}: argument {name!r} has no type; write e.g. {name}: int = 1 ({SUPPORTED})")
    return {parameter.name: parameter.replace(annotation=hints[parameter.name]) for parameter in parameters[1:]}


def _is_component(parameter: inspect.Parameter) -> bool:
    return split_annotation(parameter.annotation)[0] is Component


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _text(value: Any) -> str:
    return str(value.name if isinstance(value, Component) else plain(value))


__all__ = ["Recipe", "parse_arguments", "plain", "typed"]
