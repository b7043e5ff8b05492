"""`vitkit new`: write a new plugin or recipe, completely or not at all."""

import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path
from string import Template

from vitkit import __version__
from vitkit.errors import RunDirectoryError, RunError, UsageError, nearest, printable
from vitkit.registry import KINDS, REGISTRIES, version_of

TEMPLATES = Path(__file__).parent / "templates"
ARGUMENTS = {"head": ", in_dim=64, out_dim=10"}
USE = {
    "backbone": "A backbone turns images `(b c h w)` into tokens `(b n d)`.",
    "head": "Use it in a recipe that has a flag for a head: `vitkit run recipes/jepa_mnist.py --projector $name`.",
    "loss": 'Call it on two views of each sample; `["loss"]` of the result is the value to minimise.',
    "dataset": "Any recipe trains on it: `vitkit run recipes/jepa_mnist.py --dataset $name`.",
    "evaluator": "In a recipe, `epoch.evaluate(model, data, $name)` runs it and logs its scores.",
}  # fmt: skip


def new_plugin(name: str, kind: str, parent: Path) -> Path:
    """Write a package `parent/name` that registers one component of `kind` and passes its own tests; return its path.

    Raises `UsageError` for an unknown kind and for a name that is not valid or already taken, `RunDirectoryError` if the directory
    exists, and `RunError` if it cannot be written.
    """
    if kind not in KINDS:
        raise UsageError(f"no kind named {kind!r}{nearest(kind, KINDS) or ';'} expected {', '.join(KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise UsageError(f"a plugin's name is lower-case words and digits, joined by hyphens, such as my-{kind}; given {name!r}")
    module = name.replace("-", "_")
    _check_free(name, module, kind)
    values = {
        "distribution": name,
        "module": module,
        "name": module,
        "factory": module if kind == "dataset" else "".join(word.capitalize() for word in module.split("_")),
        "kind": kind,
        "group": REGISTRIES[kind].group,
        "plural": REGISTRIES[kind].group.split(".")[1],
        "arguments": ARGUMENTS.get(kind, ""),
        "vitkit": __version__,
        "year": str(date.today().year),
    }
    values["use"] = Template(USE[kind]).substitute(values)
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "LICENSE": "LICENSE",
        f"src/{module}/__init__.py": f"{kind}/component.py",
        f"tests/test_{module}.py": f"{kind}/test.py",
    }
    return _write(parent / name, {path: _filled(template, values) for path, template in files.items()})


def new_recipe(name: str, parent: Path) -> Path:
    """Write a recipe `parent/name.py` that runs on digits at once; return its path. Errors are those of `new_plugin`."""
    stem = name.removesuffix(".py")
    if not stem.isidentifier() or keyword.iskeyword(stem):
        raise UsageError(f"a recipe's name is a Python name such as my_recipe; given {name!r}")
    path = parent / f"{stem}.py"
    if path.exists():
        raise RunDirectoryError(f"{printable(path)} exists already; choose another name or --out")
    with tempfile.TemporaryDirectory(dir=_created(parent), prefix=".new-") as folder:
        temporary = Path(folder) / path.name
        temporary.write_text(_filled("recipe.py", {}), encoding="utf-8")
        os.replace(temporary, path)
    return path


def _check_free(name: str, module: str, kind: str) -> None:
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise UsageError(f"{module!r} is a module of Python; choose another name, such as {name}-{kind}")
    if version_of(name) is not None:
        raise UsageError(f"a distribution {name} {version_of(name)} is installed already; choose another name")
    if importlib.util.find_spec(module) is not None:
        raise UsageError(f"a module {module!r} is installed already, and only one of the two could be imported; choose another name")
    if module in REGISTRIES[kind]:
        owner = REGISTRIES[kind].entry(module).distribution
        raise UsageError(f"the {kind} {module!r} is registered by {owner} already; choose another name")


def _filled(template: str, values: dict[str, str]) -> str:
    return Template((TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")).substitute(values)


def _write(target: Path, files: dict[str, str]) -> Path:
    if target.exists():
        raise RunDirectoryError(f"{printable(target)} exists already; choose another name or --out")
    holder = Path(tempfile.mkdtemp(dir=_created(target.parent), prefix=".new-"))
    try:
        for path, text in files.items():
            file = holder / target.name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        (holder / target.name).rename(target)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
    return target


def _created(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write into {printable(folder)}: {error.strerror or error}; choose another --out") from None
    if not os.access(folder, os.W_OK):
        raise RunError(f"cannot write into {printable(folder)}: no permission; choose another --out")
    return folder


__all__ = ["new_plugin", "new_recipe"]
