"""Registries: found by metadata, imported when built, never overwritten silently."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from vitkit import Spec, backbones, heads
from vitkit.component_arguments import check_arguments, fits
from vitkit.errors import AmbiguousNameError, ArgumentsError, PluginError, UnknownNameError, UsageError
from vitkit.registry import ADDED, REGISTRIES, Registry

HEAD = '''
"""A module."""
from torch import nn

class Wide(nn.Module):
    """A wide head.

    More of it.
    """
    def __init__(self, in_dim: int, out_dim: int = 3, hidden: int | None = None, act: str = "gelu"):
        super().__init__()
        self.fc = nn.Linear(in_dim, out_dim)
'''


def test_a_plugin_is_listed_with_distribution_version_and_line_before_it_is_imported(install):
    install("wide-heads", "1.2", {"heads": {"wide": "wide_heads:Wide"}}, wide_heads=HEAD)
    entry = heads.entry("wide")
    assert (entry.distribution, entry.version, entry.summary) == ("wide-heads", "1.2", "A wide head.")
    assert "wide_heads" not in sys.modules


def test_the_line_is_found_through_re_exports(install):
    install(
        "deep", "1", {"heads": {"deep": "deep_a:Renamed"}},
        deep_a="from deep_b import Wide as Renamed\n", deep_b="from deep_c import Wide\n", deep_c=HEAD,
    )  # fmt: skip
    assert heads.entry("deep").summary == "A wide head."


def test_built_things_carry_the_spec_that_builds_them_again(install):
    install("wide-heads", "1.2", {"heads": {"wide": "wide_heads:Wide"}}, wide_heads=HEAD)
    head = heads.build("wide", in_dim=4, out_dim=2)
    assert head.spec == Spec("head", "wide", "wide-heads", {"in_dim": 4, "out_dim": 2})
    data = head.spec.to_json()
    assert data["version"] == "1.2"
    again = Spec.from_json(data).build()
    assert type(again) is type(head)
    assert again.spec == head.spec


def test_an_unknown_name_says_which_are_near_and_which_there_are():
    with pytest.raises(UnknownNameError, match=r"no head named 'lineer'; did you mean 'linear'\? known: .*mlp"):
        heads.build("lineer")
    with pytest.raises(UnknownNameError, match=r"no backbone named 'vit' from 'nobody'"):
        backbones.build("nobody:vit")


def test_two_distributions_with_one_name_need_the_distribution(install):
    points = {"heads": {"wide": "wide_heads:Wide"}}
    install("one-dist", "1.0", points, wide_heads=HEAD)
    install("two-dist", "2.0", points)
    with pytest.raises(AmbiguousNameError, match=r"one-dist 1.0 and two-dist 2.0; say which: 'one-dist:wide' or"):
        heads.build("wide", in_dim=1)
    assert heads.build("two_dist:wide", in_dim=1).spec.distribution == "two-dist"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("raise SystemExit(3)", "SystemExit"),
        ("1/0", "ZeroDivisionError"),
        ("Wide = 3", "is a int, not a class or function"),
        ("", "has no attribute 'Wide'"),
    ],
)
def test_a_broken_plugin_costs_its_own_names_alone(install, source, text):
    install("broken-one", "0.1", {"heads": {"wide": "broken_one:Wide"}}, broken_one=source)
    with pytest.raises(PluginError, match=text) as caught:
        heads.build("wide")
    assert "broken-one 0.1" in str(caught.value)
    assert {"linear", "mlp", "wide"} <= set(heads.names())
    heads.build("linear", in_dim=2, out_dim=2)


def test_unreadable_metadata_costs_only_its_distribution(install):
    site = install("garbled", "1.0", {"heads": {"x": "y:z"}})
    (site / "garbled-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[vitkit.heads]\nx")
    assert "linear" in heads.names()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"in_dim": 1, "hiden": 2}, "takes no argument 'hiden'; did you mean 'hidden'"),
        ({}, "needs the argument 'in_dim'"),
        ({"in_dim": "wide"}, "in_dim is 'wide', expected int"),
        ({"in_dim": True}, "in_dim is True, expected int"),
        ({"in_dim": 1, "hidden": 2.5}, r"hidden is 2.5, expected int \| None"),
    ],
)
def test_arguments_that_do_not_fit_come_with_the_signature(install, kwargs, text):
    install("wide-heads", "1.2", {"heads": {"wide": "wide_heads:Wide"}}, wide_heads=HEAD)
    with pytest.raises(ArgumentsError, match=text) as caught:
        heads.build("wide", **kwargs)
    assert "wide(in_dim: int, out_dim: int = 3" in str(caught.value)


def test_a_component_may_call_an_argument_as_the_registry_calls_its_own():
    registry = Registry("head")
    registry.add("named", lambda name, self: torch.nn.Linear(name, self))
    built = registry.build("named", name=2, self=3)
    assert (built.in_features, built.out_features) == (2, 3)
    assert built.spec.kwargs == {"name": 2, "self": 3}


def test_adding_by_hand_never_replaces_silently():
    registry = Registry("head")
    registry.add("mine", dict)
    with pytest.raises(UsageError, match="'mine' is already registered by \\(added\\); choose another name or pass"):
        registry.add("mine", list)
    with pytest.raises(UsageError, match="'linear' is already registered by vitkit; choose another name"):
        registry.add("linear", list, replace=True)
    registry.add("mine", dict, replace=True)
    with pytest.raises(UsageError, match="a word without colon"):
        registry.add("a:b", dict)
    with pytest.raises(UsageError, match="class or function"):
        registry.add("three", 3)


def test_a_spec_that_is_no_json_cannot_be_saved():
    with pytest.raises(UsageError, match="must be plain JSON values"):
        Spec("head", "mine", ADDED, {"act": object()}).to_json()
    with pytest.raises(UsageError, match="'kwargs' is a dict"):
        Spec.from_json({"kind": "head", "name": "a", "distribution": "b", "kwargs": []})
    with pytest.raises(UsageError, match="no registry for kind 'hed'; did you mean 'head'"):
        Spec("hed", "a", "b").build()


def test_plain_values_are_checked_against_annotations():
    assert fits(1, float)
    assert not fits(1, str)
    assert fits([1, 2], tuple[int, int])
    assert not fits([1, 2, 3], tuple[int, int])
    assert fits(["a"], list[str])
    assert not fits([1], list[str])
    check_arguments("f", lambda **anything: None, {"x": 1})


def test_every_built_in_name_can_be_imported_and_has_a_line():
    for registry in REGISTRIES.values():
        for entry in registry.entries():
            if entry.distribution == "vitkit":
                assert callable(entry.load())
                assert entry.summary, f"{entry.kind} {entry.name} has no docstring"


def test_listing_imports_neither_torch_nor_plugins():
    code = (
        "import sys; from vitkit import REGISTRIES; "
        "[entry.summary for r in REGISTRIES.values() for entry in r.entries()]; "
        "print([m for m in sys.modules if m in ('torch', 'numpy') or m.startswith('vitkit_')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def family(model: str, *, wide: bool = False) -> dict[str, Any]:
    """Any of many models."""
    return Zoo(model=model, wide=wide)


class Zoo(dict[str, Any]):
    pass


def test_a_family_stands_for_every_name_under_it():
    registry = Registry("head")
    registry.add("zoo/*", family)
    registry.add("zoo/lion", lambda: Zoo(model="own"))
    built = registry.build("zoo/tiger/white", wide=True)
    assert built == {"model": "tiger/white", "wide": True}
    assert built.spec == Spec("head", "zoo/tiger/white", ADDED, {"wide": True})
    assert registry.build("zoo/lion") == {"model": "own"}  # a name of its own comes first
    assert [name in registry for name in ("zoo/tiger", "zoo/*", "zoo/", "zoo")] == [True, True, False, False]
    assert "zoo/*" in registry.names()
    with pytest.raises(ArgumentsError, match=r"wide is 3, expected bool; its signature: zoo/tiger\(\*, wide: bool"):
        registry.build("zoo/tiger", wide=3)
    with pytest.raises(ArgumentsError, match="takes no argument 'model'"):
        registry.build("zoo/tiger", model="lion")
    with pytest.raises(ArgumentsError, match="needs the argument 'model'"):
        registry.build("zoo/*")


def test_a_family_that_cannot_be_imported_says_so(install):
    install("zoo", "1.0", {"heads": {"zoo/*": "zoo_heads:make"}}, zoo_heads="raise OSError('closed')")
    with pytest.raises(PluginError, match=r"head 'zoo/lion' of zoo 1.0 \(zoo_heads:make\) cannot be imported: OSError: closed"):
        heads.build("zoo/lion")


@pytest.mark.parametrize("replaced", [False, True], ids=["torch's own", "replaced by another library"])
def test_a_module_without_its_own_init_takes_no_arguments(replaced, monkeypatch):
    from torch import nn

    if replaced:
        original = nn.Module.__init__
        monkeypatch.setattr(nn.Module, "__init__", lambda self, *args, **kwargs: original(self, *args, **kwargs))

    class Plain(nn.Module):
        pass

    registry = Registry("loss")
    registry.add("plain", Plain)
    assert isinstance(registry.build("plain"), Plain)
    with pytest.raises(ArgumentsError, match=r"loss 'plain' takes no argument 'temperature'; its signature: plain\(\)"):
        registry.build("plain", temperature=0.1)
