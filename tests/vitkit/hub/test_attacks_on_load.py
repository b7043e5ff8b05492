"""Every registered component is attacked through a saved model's config: nothing is opened, contacted, run or filled.

The attacks are generated from the components' signatures, so that registering a component is being attacked.
"""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from vitkit import REGISTRIES, heads, losses
from vitkit.errors import ArgumentsError, CheckpointError
from vitkit.models import load, save
from vitkit.registry import Entry, Spec, architecture_only

ENTRIES = [entry for kind in ("backbone", "head", "loss") for entry in REGISTRIES[kind].entries()]
LOADER = Path(__file__).with_name("load_attacked.py")
BAIT = "bait.pt"
REMOTE = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth", "hf_hub_id": "me/x", "file": BAIT},
    "pretrained_cfg_overlay": {"file": BAIT},
    "checkpoint_path": BAIT,
    "cache_dir": "bait",
    "weights_path": BAIT,
    "url": "http://127.0.0.1:9/x.pth",
    "repo_id": "me/x",
    "token": "x",
    "trust_remote_code": True,
    "text_cfg": {"hf_model_name": "me/x", "hf_tokenizer_name": "me/x"},
    "vision_cfg": {"timm_model_name": "hf-hub:me/x", "timm_model_pretrained": True},
    "model": "local-dir:bait",
    "__class__": "os.system",
    "download": True,
}
STRINGS = (
    BAIT, "../bait.pt", "/etc/passwd", "~/.bashrc", "bait", "me/x", "hf-hub:me/x", "hf_hub:me/x", "local-dir:bait", "local-dir:.",
    "http://127.0.0.1:9/x.pth", "file:///etc/passwd", "os.system", "\x1b[2J", "a" * 10_000,
)  # fmt: skip
HUGE = (2**20 + 1, 10**12 + 1, 4 * 10**8, -(2**40), 10**30, 1e300)


def example_of(entry: Entry) -> dict[str, Any]:
    """Small arguments that build a component, as its own example gives them."""
    factory = entry.load()
    example = getattr(factory, "vitkit_example", None)
    kwargs = dict(example(2)[0]) if example else {}
    defaults = {"in_dim": 4, "out_dim": 4, "num_classes": 3, "vocab_size": 9, "context_length": 5}
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            kwargs.setdefault(name, defaults.get(name))
    return kwargs


def attacks_on(entry: Entry, *, few: bool = False) -> list[tuple[str, Any]]:
    """Arguments that a hostile config may set: each parameter to strings, dicts and huge numbers, and names of loaders."""
    parameters = inspect.signature(entry.load()).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    attacks = list(REMOTE.items())
    if few and not open_ended:  # a name that is not in the signature is refused as any other is
        attacks = [(name, value) for name, value in attacks if name in parameters] + attacks[:1]
    values = [*STRINGS, *HUGE, [BAIT], {"path": BAIT}, {"name": [BAIT]}, [10**12] * 3, [[[1]] * 4] * 4]
    if few:
        values = [BAIT, "hf-hub:me/x", 10**12 + 1]
    return attacks + [(n, value) for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD for value in values]


def is_family(entry: Entry) -> bool:
    return entry.name.endswith("/*")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    head = heads.build("linear", in_dim=4, out_dim=4)
    save(directory, {"part": head}, preprocessing={}, classes=[], arguments={})
    return directory


def config_with(model: Path, entry: Entry, name: str, kwargs: dict[str, Any]) -> str:
    config = json.loads((model / "config.json").read_text())
    spec = {"kind": entry.kind, "name": name, "distribution": entry.distribution, "version": entry.version, "kwargs": kwargs}
    return json.dumps({**config, "modules": {"part": spec}})


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.distribution}:{entry.kind}-{entry.name}")
def test_the_registry_refuses_what_is_no_architecture_for_every_component(entry: Entry, monkeypatch):
    monkeypatch.setattr(nn.Module, "__init__", lambda self, *a, **k: pytest.fail(f"{type(self).__name__} was built"))
    name = entry.name[:-1] + "test_vit" if is_family(entry) else entry.name
    example = {key: value for key, value in example_of(entry).items() if not (is_family(entry) and key == "model")}
    declared = getattr(entry.load(), "vitkit_architecture", {})
    for argument, value in attacks_on(entry):
        rule = declared.get(argument)
        if isinstance(value, str) and isinstance(rule, str) and len(value) < 200 and re.fullmatch(rule, value):
            assert re.fullmatch(r"[\w.:-]+", value)  # a name without a path; the component accepts known names only
            continue
        with architecture_only(2**20), pytest.raises(ArgumentsError) as caught:
            Spec(entry.kind, name, entry.distribution, {**example, argument: value}).build()
        assert len(str(caught.value)) < 3000


def test_nothing_is_opened_or_contacted_whatever_a_config_says(model, tmp_path):
    (tmp_path / BAIT).write_bytes(b"not to be read")
    (tmp_path / "bait").mkdir()
    (tmp_path / "bait" / "config.json").write_text("{}")
    (tmp_path / "bait" / "open_clip_config.json").write_text("{}")
    directories = []
    for number, entry in enumerate(ENTRIES):
        names = [entry.name]
        if is_family(entry):
            names = [entry.name[:-1] + member for member in ("test_vit", *STRINGS)]
        for name in names:
            changes = attacks_on(entry) if name == names[0] else [("in_chans", 3)]
            for argument, value in [*changes, (None, None)]:
                directory = tmp_path / f"{number}-{len(directories)}"
                directory.mkdir()
                kwargs = {**example_of(entry), **({argument: value} if argument else {})}
                (directory / "config.json").write_text(config_with(model, entry, name, kwargs))
                (directory / "model.safetensors").hardlink_to(model / "model.safetensors")
                directories.append(directory)
    outcome = subprocess.run(
        [sys.executable, str(LOADER), *(str(directory) for directory in directories)],
        cwd=tmp_path, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    results = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert len(results) == len(directories) > 150
    assert [result for result in results if result["events"]] == []
    surprising = [result for result in results if (result["message"] or "").startswith("unexpected")]
    assert surprising == []
    loaded = [result["directory"] for result in results if result["message"] is None]
    assert all(Path(directory).is_dir() for directory in loaded)
    assert (tmp_path / BAIT).read_bytes() == b"not to be read"
    assert sorted(path.name for path in (tmp_path / "bait").iterdir()) == ["config.json", "open_clip_config.json"]


class Careless(nn.Module):
    """A component of somebody who did not think of strangers: it opens whatever it is given."""

    def __init__(self, weights: str | None = None, pretrained: bool = False, width: int = 2, act: str = "gelu", **more: Any):
        super().__init__()
        self.linear = nn.Linear(width, width)
        if pretrained or weights or more:
            raise SystemExit(f"opened {weights} {more}")


class Careful(nn.Module):
    """A component that declares its strings and its further arguments."""

    vitkit_architecture: ClassVar[dict[str, Any]] = {"act": "gelu|relu", "weights": {"[a-z]+": float}, "heads": int | None}

    def __init__(self, act: str = "gelu", weights: dict[str, float] | None = None, **more: Any):
        super().__init__()
        self.given = {"act": act, "weights": weights, **more}


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setattr(heads, "_added", {})
    heads.add("careless", Careless)
    heads.add("careful", Careful)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": "x.pt"}, "weights is 'x.pt'; a saved model gives a component only its architecture"),
        ({"pretrained": True}, "pretrained is True; a saved model must not name weights, files or addresses"),
        ({"act": "gelu"}, "act is 'gelu'; a saved model gives a component only its architecture"),
        ({"checkpoint_path": 3}, "'checkpoint_path' is not declared as architecture"),
        ({"width": 2**21}, "width is 2097152; expected a finite number of at most 1,048,576"),
    ],
)
def test_a_component_that_declares_nothing_is_safe(added, tmp_path, kwargs, message):
    save(tmp_path, {"part": heads.build("careless")}, preprocessing={}, classes=[], arguments={})
    load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["modules"]["part"]["kwargs"] = kwargs
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_component_takes_the_strings_dicts_and_names_that_it_declares(added):
    with architecture_only(100):
        built = heads.build("careful", act="relu", weights={"a": 0.5}, heads=3)
        assert built.given == {"act": "relu", "weights": {"a": 0.5}, "heads": 3}
        for kwargs, message in (
            ({"act": "tanh"}, "act is 'tanh'; a saved model gives"),
            ({"weights": {"../a": 1.0}}, r"its key '../a' is not declared as architecture; expected \[a-z\]\+"),
            ({"weights": {"a": "x"}}, "a is 'x', expected float"),
            ({"heads": "x"}, r"heads is 'x'; expected int \| None"),
            ({"depth": 3}, "'depth' is not declared as architecture"),
            ({"weights": {f"{chr(97 + i % 26)}{chr(97 + i // 26)}": 1.0 for i in range(101)}}, "hold more than 100 values"),
        ):
            with pytest.raises(ArgumentsError, match=message):
                heads.build("careful", **kwargs)
    assert heads.build("careful", act="tanh", depth=3).given["depth"] == 3  # a user's own code builds what it likes


def test_a_component_within_another_takes_architecture_alone(added, monkeypatch):
    monkeypatch.setattr(losses, "_added", {})
    losses.add("careless", Careless)
    with architecture_only(2**20), pytest.raises(ArgumentsError, match=r"key 'weights' is not|weights is .*expected float"):
        losses.build("pair_multi_task", contrastive="careless", arguments={"weights": "x.pt"})
    with architecture_only(2**20), pytest.raises(ArgumentsError, match="loss 'careless': pretrained is True; a saved model must"):
        losses.build("pair_multi_task", contrastive="careless", arguments={"pretrained": True})


def test_saving_warns_of_an_argument_that_loading_will_refuse(added, tmp_path):
    head = heads.build("careless", act="relu")
    with pytest.warns(UserWarning, match="module 'part' is saved, but vitkit.load will refuse it: head 'careless': act is 'relu'"):
        save(tmp_path, {"part": head}, preprocessing={}, classes=[], arguments={})


def test_a_plugin_that_registers_names_of_vitkit_breaks_no_saved_model(tmp_path, install):
    from vitkit import backbones

    text = {"contrastive": "info_nce", "arguments": {"temperature": 0.2}}
    parts = {
        "backbone": backbones.build("multimodal_vit", img_size=8, embed_dim=8, depth=1, num_heads=2),
        "projector": heads.build("mlp", in_dim=8, out_dim=4),
        "loss": losses.build("pair_multi_task", **text),
    }
    save(tmp_path / "m", parts, preprocessing={}, classes=[], arguments={})
    points = {"backbones": {"vit": "evil:vit"}, "heads": {"mlp": "evil:vit"}, "losses": {"info_nce": "evil:vit"}}
    install("evil", "1.0", points, evil="raise SystemExit(3)")
    model = load(tmp_path / "m")
    assert model.projector.spec.distribution == "vitkit"
    assert heads.build("mlp", in_dim=2, out_dim=2).spec.distribution == "vitkit"
    assert "evil" not in sys.modules


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is of Linux")
def test_refusals_take_little_memory(model, tmp_path):
    """The largest numbers that a config may say, for every component, within 640 MiB above a process that only imported them."""
    directories = []
    for entry in ENTRIES:
        name = entry.name[:-1] + "test_vit" if is_family(entry) else entry.name
        example = {key: v for key, v in example_of(entry).items() if not (is_family(entry) and key == "model")}
        for argument, parameter in inspect.signature(entry.load()).parameters.items():
            for value in (2**20, [2**20, 2**20]) if "int" in str(parameter.annotation) else ():
                directory = tmp_path / f"{entry.kind}-{entry.name.replace('/', '-')}-{argument}-{len(directories)}"
                directory.mkdir()
                (directory / "config.json").write_text(config_with(model, entry, name, {**example, argument: value}))
                (directory / "model.safetensors").hardlink_to(model / "model.safetensors")
                directories.append(str(directory))
    code = (
        "import resource, runpy, sys, vitkit\n"
        "for kind in ('backbone', 'head', 'loss'): [entry.load() for entry in vitkit.REGISTRIES[kind].entries()]\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 640 * 2**20, -1))\n"
        f"sys.argv = ['x', *{directories!r}]\n"
        f"runpy.run_path({str(LOADER)!r}, run_name='__main__')\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=580)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    messages = [json.loads(line)["message"] for line in outcome.stdout.splitlines()]
    assert len(messages) == len(directories) > 60
    assert [message for message in messages if message is None or "MemoryError" in message or "unexpected" in message] == []
