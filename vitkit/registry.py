"""Five registries, filled from entry points and read without importing any plugin.

`[project.entry-points."vitkit.heads"]` in a plugin's pyproject.toml is all that registering takes. Names,
distributions and versions come from installed metadata; a plugin is imported when one of its names is built.

Entry points are static, so whoever has more models than entry points registers a family: `"timm/*" = "vitkit_timm:timm"`.
Building `timm/NAME` calls `timm(NAME, ...)`; its Spec keeps the whole name.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, version
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitkit.docstrings import summary_of
from vitkit.errors import AmbiguousNameError, ArgumentsError, PluginError, UnknownNameError, UsageError, nearest

KINDS = ("backbone", "head", "loss", "dataset", "evaluator")
ADDED = "(added)"
"""The distribution of what `Registry.add` put in by hand: it belongs to no installed package."""
FAMILY = "/*"
"""How the name of an entry ends that stands for every name under it."""


def canonical(distribution: str) -> str:
    """A distribution's name as the packaging standard compares it: `My_Pkg` and `my-pkg` are one."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@dataclass(frozen=True)
class Spec:
    """What was built: kind, name, distribution and plain JSON keyword arguments. `build()` makes it again."""

    kind: str
    name: str
    distribution: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Build it through its registry; errors are those of `Registry.build`."""
        if self.kind not in REGISTRIES:
            raise UsageError(f"no registry for kind {self.kind!r}{nearest(self.kind, KINDS)}; known: {', '.join(KINDS)}")
        name = self.name if self.distribution == ADDED else f"{self.distribution}:{self.name}"
        return REGISTRIES[self.kind].build(name, **self.kwargs)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, the distribution's version among them; `UsageError` for arguments that are none."""
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
        """The inverse of `to_json`; `UsageError` where a field is missing or of another type."""
        wanted = {"kind": str, "name": str, "distribution": str, "kwargs": dict}
        if not isinstance(data, dict):
            raise UsageError(f"a Spec is a JSON object with {', '.join(wanted)}; given {type(data).__name__}")
        for key, kind in wanted.items():
            if not isinstance(data.get(key), kind):
                raise UsageError(f"a Spec's {key!r} is a {kind.__name__}; given {data.get(key)!r:.80}")
        return cls(data["kind"], data["name"], data["distribution"], dict(data["kwargs"]))


@dataclass(frozen=True)
class Entry:
    """One registered name: where it comes from, and the factory once it has been asked for."""

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
        """Import the factory; `PluginError` where the plugin cannot be imported or registers no callable.

        For a member of a family it is the family's, with the member's name as its first argument.
        """
        if self.member is not None:
            family = replace(self, member=None).load()
            bound = partial(family, self.member)
            bound.__doc__ = family.__doc__
            return bound
        if self.factory is not None:
            return self.factory
        module, _, attribute = self.value.partition(":")
        where = f"{self.kind} {self.name!r} of {self.distribution} {self.version} ({self.value})"
        try:
            found: Any = import_module(module)
            for part in filter(None, attribute.split(".")):
                found = getattr(found, part)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise anything on import, SystemExit too
            raise PluginError(
                f"{where} cannot be imported: {type(error).__name__}: {error}; "
                f"mend it with `pip install --upgrade {self.distribution}` or remove it with "
                f"`pip uninstall {self.distribution}`"
            ) from error
        if not callable(found):
            raise PluginError(f"{where} is a {type(found).__name__}, not a class or function; its author must mend it")
        return found


class Registry:
    """A kind's name → factory map, read from the entry-point group `vitkit.<kind>s`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.group = "vitkit.losses" if kind == "loss" else f"vitkit.{kind}s"
        self._added: dict[str, Entry] = {}

    def add(self, name: str, factory: Callable[..., Any], *, replace: bool = False) -> None:
        """Register `factory` in this process alone: for notebooks and tests.

        Raises `UsageError` for a name that is taken (`replace=True` replaces what was added by hand, never a
        plugin's), that holds a colon or space, or for a factory that cannot be called.
        """
        if not re.fullmatch(r"[^\s:]+", name):
            raise UsageError(f"a {self.kind}'s name is a word without colon or space; given {name!r}")
        if not callable(factory):
            raise UsageError(f"a {self.kind} is registered as a class or function; given {factory!r:.80}")
        taken = next((entry for entry in self.entries() if entry.name == name), None)
        if taken and not (replace and taken.distribution == ADDED):
            way = "choose another name" + ("" if taken.distribution != ADDED else " or pass replace=True")
            raise UsageError(f"{self.kind} {name!r} is already registered by {taken.distribution}; {way}")
        self._added[name] = Entry(self.kind, name, ADDED, "", repr(factory), factory)

    def entries(self) -> list[Entry]:
        """Every registered name in alphabetical order, from metadata alone."""
        found = {(entry.name, entry.distribution): entry for entry in _installed(self.kind, self.group)}
        found |= {(entry.name, entry.distribution): entry for entry in self._added.values()}
        return [found[key] for key in sorted(found)]

    def names(self) -> list[str]:
        """Every registered name, once."""
        return sorted({entry.name for entry in self.entries()})

    def __contains__(self, name: str) -> bool:
        return any(_claims(entry, name) for entry in self.entries())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def entry(self, name: str) -> Entry:
        """The entry of `name` or `dist:name`; `UnknownNameError`, or `AmbiguousNameError` where two claim it.

        A name that no entry has may belong to a family: `timm/resnet18` to `timm/*`.
        """
        distribution, _, short = name.rpartition(":")
        entries = self.entries()
        own = [e for e in entries if not distribution or canonical(e.distribution) == canonical(distribution)]
        found = [entry for entry in own if entry.name == short] or [entry for entry in own if _claims(entry, short)]
        if len(found) == 1:
            member = None if found[0].name == short else short[len(found[0].name) - 1 :]
            return replace(found[0], name=short, member=member)
        if found:
            both = " and ".join(f"{entry.distribution} {entry.version}".strip() for entry in found)
            ways = " or ".join(f"'{entry.distribution}:{short}'" for entry in found)
            raise AmbiguousNameError(f"{self.kind} {short!r} is registered by {both}; say which: {ways}")
        known = sorted({entry.name for entry in entries})
        asked = f"{short!r} from {distribution!r}" if distribution else repr(name)
        near = nearest(short, known) or ";"
        listing = ", ".join(known) or f"none (no installed distribution declares {self.group!r} entry points)"
        raise UnknownNameError(f"no {self.kind} named {asked}{near} known: {listing}")

    def get(self, name: str) -> Callable[..., Any]:
        """The factory of `name` or `dist:name`, imported now."""
        return self.entry(name).load()

    def build(self, name: str, **kwargs: Any) -> Any:
        """Call the factory of `name` (or `dist:name`) with `kwargs` and leave the `Spec` on what it returns.

        Raises `UnknownNameError`, `AmbiguousNameError`, `PluginError`, and `ArgumentsError` for arguments that do
        not fit the factory's signature.
        """
        entry = self.entry(name)
        factory = entry.load()
        check_arguments(f"{self.kind} {entry.name!r}", factory, kwargs)
        built = factory(**kwargs)
        try:
            built.spec = Spec(self.kind, entry.name, entry.distribution, dict(kwargs))
        except AttributeError:
            # A frozen dataclass or a plain function's result may refuse; object.__setattr__ reaches the former.
            object.__setattr__(built, "spec", Spec(self.kind, entry.name, entry.distribution, dict(kwargs)))
        return built


def _claims(entry: Entry, name: str) -> bool:
    """Whether an entry is called `name`, or is the family that a member of this name belongs to."""
    if entry.name == name:
        return True
    prefix = entry.name[:-1]
    return entry.name.endswith(FAMILY) and name.startswith(prefix) and len(name) > len(prefix)


def _installed(kind: str, group: str) -> Iterator[Entry]:
    """The entries that installed distributions declare; one with unreadable metadata costs only its own."""
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
                about = distribution.metadata  # parsed each time that it is asked for, a README with it
                if about["Name"]:
                    yield about["Name"], about["Version"], points
        except Exception:
            continue  # `vitkit doctor` names distributions with unreadable metadata


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None where it is not installed."""
    try:
        return version(distribution)
    except (PackageNotFoundError, ValueError):
        return None


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """A factory's signature; a class that leaves torch's `Module.__init__` as it is takes nothing, though that one takes all."""
    own = getattr(factory, "__init__", None) if inspect.isclass(factory) else None
    if (getattr(own, "__module__", ""), getattr(own, "__qualname__", "")) == ("torch.nn.modules.module", "Module.__init__"):
        return inspect.Signature()
    return inspect.signature(factory)


def signature_of(name: str, factory: Callable[..., Any]) -> str:
    """`name(in_dim: int, hidden: int = 512)`, as messages and `vitkit show` print it."""
    try:
        signature = _signature(factory)
    except (TypeError, ValueError):
        return f"{name}(...)"
    return f"{name}{signature.replace(return_annotation=inspect.Signature.empty)}"


def check_arguments(what: str, factory: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raise `ArgumentsError` where keyword arguments do not fit a signature, by name or by plain type."""
    try:
        signature = _signature(factory)
    except (TypeError, ValueError):
        return
    shown = signature_of(what.split("'")[1] if "'" in what else what, factory)
    takes = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in kwargs:
        if name not in takes and not open_ended:
            raise ArgumentsError(f"{what} takes no argument {name!r}{nearest(name, takes)}; its signature: {shown}")
    for p in signature.parameters.values():
        if p.name in takes and p.default is p.empty and p.name not in kwargs:
            raise ArgumentsError(f"{what} needs the argument {p.name!r}; its signature: {shown}")
    hints = _hints(factory)
    for name, value in kwargs.items():
        if name in hints and not fits(value, hints[name]):
            raise ArgumentsError(
                f"{what}: {name} is {value!r:.80}, expected {_type_name(hints[name])}; its signature: {shown}"
            )


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    factory = factory.func if isinstance(factory, partial) else factory
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return get_type_hints(target)
    except Exception:  # a hint that only a type checker can resolve checks nothing here
        return {}


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain JSON value can be meant by an annotation; annotations beyond JSON's types accept all."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple) and arguments:
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(item, arguments[0]) for item in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is None or annotation is NoneType:
        return value is None
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return True


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
