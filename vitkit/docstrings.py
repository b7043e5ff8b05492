"""Summaries of components, read from a plugin's source without running it.

`vitkit list` shows one line for each registered name and must import neither the plugin nor torch, so the
docstring's first line is taken from the parsed source file.
"""

import ast
import importlib.util
from pathlib import Path

_REEXPORTS = 4  # a name is often re-exported once or twice: package → module → private module


def summary_of(value: str) -> str:
    """The first docstring line of the object an entry point such as `package.module:Class` names, or `""`."""
    module, _, attribute = value.partition(":")
    try:
        node = _find(module, attribute.split(".")[0], _REEXPORTS)
    except (OSError, SyntaxError, ValueError, ImportError):
        return ""
    docstring = ast.get_docstring(node) if node is not None else None
    return docstring.strip().split("\n")[0] if docstring else ""


def source_file(module: str) -> Path | None:
    """The file that importing `module` would run, located without importing its parents."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # a top-level name, so nothing is imported
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder).joinpath(*rest)
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


def _find(module: str, name: str, reexports: int) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The class or function `name` of `module`, through `from x import name` where it is re-exported."""
    path = source_file(module)
    if path is None or reexports == 0 or not name:
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(_absolute(module, path, node), alias.name, reexports - 1)
    return None


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    """The absolute name of the module that a `from` import in `module` names."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])
