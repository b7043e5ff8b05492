"""Modules beside a recipe: importable while the recipe is loaded and run, and copied with it into the run's directory.

The copy of the recipe finds the copies of its modules in the folder `modules` beside it, so it runs without the original folder.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from vitkit.runs.directory import MODULES

_loaded: set[str] = set()
"""Names in `sys.modules` that belong to the last recipe. The next recipe may have other modules of the same names."""


class LocalModules:
    """The modules that a recipe imports from its own folder.

    `sources` are their files by path relative to the folder: those imported so far and, for a recipe that is a run's copy, all
    files that were copied with it.
    """

    def __init__(self, recipe: Path) -> None:
        folder = recipe.resolve().parent
        copies = folder / MODULES
        self.folders = [folder, *([copies] if recipe.name == "recipe.py" and copies.is_dir() else [])]
        for name in _loaded:
            sys.modules.pop(name, None)
        _loaded.clear()
        self._before = set(sys.modules)  # a package installed from this folder, vitkit itself for example, is not the recipe's
        self.sources: dict[str, bytes] = {}
        for path in sorted(copies.rglob("*.py")) if copies in self.folders else []:
            self.sources[path.relative_to(copies).as_posix()] = path.read_bytes()  # --overwrite removes the files

    @contextlib.contextmanager
    def importable(self) -> Iterator[None]:
        """Put the folders first on `sys.path`, as Python does for a script; afterwards note the modules that were imported."""
        paths = [str(folder) for folder in self.folders]
        sys.path[:0] = paths
        try:
            yield
        finally:
            self.note()
            for path in paths:
                with contextlib.suppress(ValueError):
                    sys.path.remove(path)

    def note(self) -> None:
        """Read the files of the modules that have been imported since the last call."""
        for name in sys.modules.keys() - self._before:
            file = getattr(sys.modules.get(name), "__file__", None)
            stem = name.replace(".", "/")
            for relative in (f"{stem}.py", f"{stem}/__init__.py"):
                if file and any(Path(file) == folder / relative for folder in self.folders):
                    _loaded.add(name)
                    with contextlib.suppress(OSError):
                        self.sources.setdefault(relative, Path(file).read_bytes())


__all__ = ["LocalModules"]
