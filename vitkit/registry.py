"""Five registries, filled from entry points and read without importing any plugin.

A plugin registers a component by an entry point, `[project.entry-points."vitkit.heads"]`, in its pyproject.toml. Names,
distributions and versions come from installed metadata; a plugin is imported when one of its names is built.

Entry points are static. A plugin with more models than entry points registers a family: `"timm/*" = "vitkit_timm:timm"`.
Building `timm/NAME` calls `timm(NAME, ...)`; its Spec keeps the full name.

A name that several distributions register means, in this order: while a component builds another one, the entry of that
component's distribution; the entry of vitkit itself. So a plugin that registers `vit` changes neither saved models, nor recipes,
nor commands; its own component is `its-distribution:vit`. Between other distributions the name is ambiguous.
"""

import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import Any

from vitkit.component_arguments import check_architecture, check_arguments
from vitkit.docstrings import summary_of
from vitkit.errors import AmbiguousNameError, PluginError, UnknownNameError, UsageError, nearest

KINDS = ("backbone", "head", "loss", "dataset", "evaluator")
ADDED = "(added)"
"""The distribution of a component that `Registry.add` registered: it belongs to no installed package."""
FAMILY = "/*"
"""The end of an entry's name that stands for every name under it."""
VITKIT = "vitkit"
MAX_NAME_CHARACTERS = 200
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)

_building: ContextVar[str | None] = ContextVar("distribution of the component that is being built", default=None)
_largest: ContextVar[int | None] = ContextVar("largest number among a saved model's arguments", default=None)


def canonical(distribution: str) -> str:
    """A distribution's name as the packaging standard compares it: `My_Pkg` and `my-pkg` are one."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@contextmanager
def architecture_only(largest: int) -> Iterator[None]:
    """Within this block, in this thread, components are built with the arguments of a saved model, which are not trusted.

    Every component, even one that another component builds, takes only architecture: see `vitkit.component_arguments`. Numbers are at
    most `largest` in size.
    """
    token = _largest.set(largest)
    try:
        yield
    finally:
        _largest.reset(token)


@dataclass(frozen=True)
class Spec:
    """Kind, name, distribution and plain JSON keyword arguments of a component; `build()` builds it again."""

    kind: str
    name: str
    distribution: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Build the component through its registry; errors are those of `Registry.build`."""
        if self.kind not in REGISTRIES:
            raise UsageError(f"no registry for kind {self.kind!r}{nearest(self.kind, KINDS)}; known: {', '.join(KINDS)}")
        return REGISTRIES[self.kind].build(f"{self.distribution}:{self.name}", **self.kwargs)

    def check_architecture(self, largest: int = sys.maxsize) -> None:
        """Raise `ArgumentsError` if a saved model could not be built with these arguments: see `vitkit.component_arguments`."""
        factory = REGISTRIES[self.kind].get(f"{self.distribution}:{self.name}")
        check_architecture(f"{self.kind} {self.name!r}", factory, self.kwargs, largest)

    def to_json(self) -> dict[str, Any]:
        """The Spec as plain JSON values, with the distribution's version; `UsageError` for other arguments."""
        try:
            kwargs = json.loads(json.dumps(self.kwargs, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{self.kind} {self.name!r} cannot be saved: its arguments must be plain JSON values ({error}); "
                f"given {self.kwargs!r}"
            ) from None
        return {
            "kind": self.kind,
            "name": self.name,
            "distribution": self.distribution,
            "version": version_of(self.distribution),
            "kwargs": kwargs,
        }

    @classmethod
    def from_json(cls, data: Any) -> "Spec":
        """The inverse of `to_json`; `UsageError` if a field is missing, of another type or too long."""
        types = {"kind": str, "name": str, "distribution": str, "kwargs": dict}
        if not isinstance(data, dict):
            raise UsageError(f"a Spec is a JSON object with {', '.join(types)}; given {type(data).__name__}")
        for key, kind in types.items():
            if not isinstance(data.get(key), kind):
                raise UsageError(f"a Spec's {key!r} is a {kind.__name__}; given {data.get(key)!r:.80}")
            if kind is str and len(data[key]) > MAX_NAME_CHARACTERS:
                raise UsageError(f"a Spec's {key!r} has at most {MAX_NAME_CHARACTERS} characters; given {data[key]!r:.80}")
        if data["distribution"] != ADDED and not _DISTRIBUTION.fullmatch(data["distribution"]):
            raise UsageError(f"a Spec's 'distribution' is the name of a Python package; given {data['distribution']!r:.80}")
        return cls(data["kind"], data["name"], data["distribution"], dict(data["kwargs"]))


@dataclass(frozen=True)
class Entry:
    """One registered name, the distribution that it comes from, and its factory if `Registry.add` registered it."""

    kind: str
    name: str
    distribution: str
    version: str
    value: str
    factory: Callable[..., Any] | None = None
    member: str | None = None

    @property
    def summary(self) -> str:
        """The first line of the factory's docstring, read from its source without importing it."""
        if self.factory is not None:
            return (inspect.getdoc(self.factory) or "").strip().split("\n")[0]
        return summary_of(self.value)

    def load(self) -> Callable[..., Any]:
        """Import the factory; `PluginError` if the plugin cannot be imported or registers no callable.

        The factory of a family's member is the family's factory with the member's name as its first argument.
        """
        if self.member is not None:
            family = replace(self, member=None).load()
            bound = partial(family, self.member)
            bound.__doc__ = family.__doc__
            return bound
        if self.factory is not None:
            return self.factory
        module, _, attribute = self.value.partition(":")
        package = shlex.quote(self.distribution)
        where = f"{self.kind} {self.name!r} of {self.distribution} {self.version} ({self.value})"
        try:
            factory: Any = import_module(module)
            for part in filter(None, attribute.split(".")):
                factory = getattr(factory, part)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise anything on import, SystemExit too
            raise PluginError(
                f"{where} cannot be imported: {type(error).__name__}: {error}; fix it with "
                f"`pip install --upgrade {package}`, or uninstall it with `pip uninstall {package}`"
            ) from error
        if not callable(factory):
            raise PluginError(f"{where} is a {type(factory).__name__}, not a class or function; report it to the plugin's author")
        return factory


class Registry:
    """A kind's name → factory map, read from the entry-point group `vitkit.<kind>s`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.group = "vitkit.losses" if kind == "loss" else f"vitkit.{kind}s"
        self._added: dict[str, Entry] = {}

    def add(self, name: str, factory: Callable[..., Any], *, replace: bool = False) -> None:
        """Register `factory` in this process only: for notebooks and tests.

        Raises `UsageError` for a name that is already registered (`replace=True` replaces a factory that `add` registered, never a
        plugin's), for a name with a colon or a space, and for a factory that is not callable.
        """
        if not re.fullmatch(r"[^\s:]+", name):
            raise UsageError(f"a {self.kind}'s name is a word without colon or space; given {name!r}")
        if not callable(factory):
            raise UsageError(f"a {self.kind} is registered as a class or function; given {factory!r:.80}")
        taken = next((entry for entry in self.entries() if entry.name == name), None)
        if taken and not (replace and taken.distribution == ADDED):
            advice = "choose another name" + ("" if taken.distribution != ADDED else " or pass replace=True")
            raise UsageError(f"{self.kind} {name!r} is already registered by {taken.distribution}; {advice}")
        self._added[name] = Entry(self.kind, name, ADDED, "", repr(factory), factory)

    def entries(self) -> list[Entry]:
        """Every registered name in alphabetical order, read from metadata only."""
        entries = {(entry.name, entry.distribution): entry for entry in _installed(self.kind, self.group)}
        entries |= {(entry.name, entry.distribution): entry for entry in self._added.values()}
        return [entries[key] for key in sorted(entries)]

    def names(self) -> list[str]:
        """Every registered name, once."""
        return sorted({entry.name for entry in self.entries()})

    def __contains__(self, name: str) -> bool:
        return any(_claims(entry, name) for entry in self.entries())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def entry(self, name: str) -> Entry:
        """The entry of `name` or `dist:name`.

        A name that has no entry may belong to a family: `timm/resnet18` to `timm/*`. Raises `UnknownNameError`, and
        `AmbiguousNameError` if several distributions register the name and the module's rules choose none of them.
        """
        distribution, _, short = name.rpartition(":")
        entries = self.entries()
        candidates = [e for e in entries if not distribution or canonical(e.distribution) == canonical(distribution)]
        claims = [e for e in candidates if e.name == short] or [e for e in candidates if _claims(e, short)]
        if len(claims) > 1:
            preferred = (entry for first in (_building.get(), VITKIT) for entry in claims if entry.distribution == first)
            claims = list(preferred)[:1] or claims
        if len(claims) == 1:
            member = None if claims[0].name == short else short[len(claims[0].name) - 1 :]
            return replace(claims[0], name=short, member=member)
        if claims:
            several = " and ".join(f"{entry.distribution} {entry.version}".strip() for entry in claims)
            choices = " or ".join(f"'{entry.distribution}:{short}'" for entry in claims)
            raise AmbiguousNameError(f"{self.kind} {short!r} is registered by {several}; say which: {choices}")
        names = sorted({entry.name for entry in entries})
        wanted = f"{short!r} from {distribution!r}" if distribution else repr(name)
        near = nearest(short, names) or ";"
        listing = ", ".join(names) or f"none (no installed distribution declares {self.group!r} entry points)"
        raise UnknownNameError(f"no {self.kind} named {wanted}{near} known: {listing}")

    def get(self, name: str) -> Callable[..., Any]:
        """The factory of `name` or `dist:name`, imported now."""
        return self.entry(name).load()

    def build(self, name: str, /, **kwargs: Any) -> Any:
        """Call the factory of `name` (or `dist:name`) with `kwargs` and set the attribute `spec` of its result.

        Raises `UnknownNameError`, `AmbiguousNameError`, `PluginError`, and `ArgumentsError` for arguments that do
        not fit the factory's signature or, within `architecture_only`, are no architecture.
        """
        entry = self.entry(name)
        factory = entry.load()
        what = f"{self.kind} {entry.name!r}"
        check_arguments(what, factory, kwargs)
        largest = _largest.get()
        if largest is not None:
            check_architecture(what, factory, kwargs, largest)
        token = _building.set(entry.distribution)
        try:
            component = factory(**kwargs)
        finally:
            _building.reset(token)
        spec = Spec(self.kind, entry.name, entry.distribution, dict(kwargs))
        try:
            component.spec = spec
        except AttributeError:
            object.__setattr__(component, "spec", spec)  # a frozen dataclass refuses plain assignment
        return component


def _claims(entry: Entry, name: str) -> bool:
    """Whether an entry has this name, or is the family of a member with this name."""
    if entry.name == name:
        return True
    prefix = entry.name[:-1]
    return entry.name.endswith(FAMILY) and name.startswith(prefix) and len(name) > len(prefix)


def _installed(kind: str, group: str) -> Iterator[Entry]:
    """The entries that installed distributions declare; a distribution with unreadable metadata is skipped."""
    seen: set[str] = set()
    for name, number, points in _distributions():
        if name in seen:  # the first on sys.path is the one that would be imported
            continue
        seen.add(name)
        for point in points:
            if point.group == group:
                yield Entry(kind, point.name, name, number, point.value)


def _distributions() -> Iterator[tuple[str, str, list[Any]]]:
    """Name, version and entry points of each distribution that declares any of vitkit's."""
    for distribution in distributions():
        try:
            points = [point for point in distribution.entry_points if point.group.startswith("vitkit.")]
            if points:
                about = distribution.metadata  # parses the whole README at each access
                if about["Name"]:
                    yield about["Name"], about["Version"], points
        except Exception:
            continue  # `vitkit doctor` names distributions with unreadable metadata


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None if it is not installed."""
    try:
        return version(distribution)
    except (PackageNotFoundError, ValueError):
        return None


@dataclass(frozen=True, init=False)
class Component:
    """A registered name with keyword arguments, not built yet: `Component("head", "mlp", hidden=256)`.

    As the default of a recipe's argument it makes two flags, see `vitkit.training.recipe`.
    """

    kind: str
    name: str
    kwargs: dict[str, Any]

    def __init__(self, kind: str, name: str, /, **kwargs: Any) -> None:
        for field_name, value in (("kind", kind), ("name", name), ("kwargs", kwargs)):
            object.__setattr__(self, field_name, value)
        if kind not in KINDS:
            raise UsageError(f"no registry for kind {kind!r}{nearest(kind, KINDS)}; expected one of {', '.join(KINDS)}")

    def build(self, **kwargs: Any) -> Any:
        """Build it through its registry; of equal names the component's own arguments win. Errors are those of `Registry.build`."""
        return REGISTRIES[self.kind].build(self.name, **{**kwargs, **self.kwargs})


NESTED_BACKBONE: dict[str, Any] = {"backbone": r"([\w.-]+:)?[\w.-]+", "backbone_args": {r"[a-z_]+": r"[\w.]*"}}
"""`vitkit_architecture` of a component that builds a backbone from its arguments `backbone`, a registered name, and `backbone_args`.

The arguments are checked again where the backbone is built.
"""

backbones = Registry("backbone")
heads = Registry("head")
losses = Registry("loss")
datasets = Registry("dataset")
evaluators = Registry("evaluator")

REGISTRIES: dict[str, Registry] = {
    "backbone": backbones,
    "head": heads,
    "loss": losses,
    "dataset": datasets,
    "evaluator": evaluators,
}
