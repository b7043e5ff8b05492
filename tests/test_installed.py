"""Plugins as they are met: packages that pip really installed, in an environment of their own.

The environment sees what the tests' own has (torch takes minutes to install) and keeps what is installed into it apart.
"""

import json
import os
import re
import subprocess
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

from vitkit.cli.scaffold import new_plugin
from vitkit.registry import KINDS
from vitkit.testing import CHECKS

ROOT = Path(__file__).parent.parent
PLUGINS_README = ROOT / "plugins" / "README.md"

pytestmark = pytest.mark.slow

HEAD = '''
"""A head."""
from torch import Tensor, nn

class Head(nn.Module):
    """A linear map of features `(b in_dim)` → `(b out_dim)`."""
    def __init__(self, in_dim: int, out_dim: int, {argument}: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, {argument}), nn.Linear({argument}, out_dim))
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
'''


class Environment:
    """A throw-away environment with its own packages in front of the tests' own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False)
        scripts = sysconfig.get_path("scripts", "venv", {"base": str(folder / "venv")})
        self.python = Path(scripts) / "python"
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "venv")}))
        # addsitedir also reads the .pth files in there, by which vitkit itself may be installed editable.
        (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        for tool in ("vitkit", "pip", "pytest"):
            script = Path(scripts) / tool
            script.write_text(f'#!/bin/sh\nexec "{self.python}" -m {tool} "$@"\n')
            script.chmod(0o755)

    def run(self, *words: str, code: int = 0) -> str:
        """What `python WORDS` prints; it must end with `code`."""
        return self.call([str(self.python), *words], code)

    def call(self, words: list[str], code: int = 0) -> str:
        # Without build isolation and dependencies pip needs no network; its "0" is what switches isolation off.
        settings = {
            "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1", "PIP_QUIET": "1",
        }  # fmt: skip
        done = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, **settings}, cwd=self.folder, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        return said

    def pip(self, *words: str) -> str:
        return self.run("-m", "pip", *words)

    def install(self, *projects: Path, editable: bool = False) -> None:
        targets = [word for project in projects for word in (["-e"] if editable else []) + [str(project)]]
        self.pip("install", *targets)

    def project(self, name: str, version: str, points: dict[str, str], source: str) -> Path:
        """A package with one module and entry points `{"heads.wide": "Head"}`."""
        module, folder = name.replace("-", "_"), self.folder / "projects" / f"{name}-{version}"
        folder.mkdir(parents=True)
        (folder / f"{module}.py").write_text(source)
        lines = ["[build-system]", 'requires = ["hatchling"]', 'build-backend = "hatchling.build"', "[project]"]
        lines += [f'name = "{name}"', f'version = "{version}"']
        for group in dict.fromkeys(key.partition(".")[0] for key in points):
            lines += [f'[project.entry-points."vitkit.{group}"]']
            lines += [f'{k.partition(".")[2]} = "{module}:{value}"' for k, value in points.items() if k.startswith(group)]
        lines += ["[tool.hatch.build.targets.wheel]", f'include = ["{module}.py"]']
        (folder / "pyproject.toml").write_text("\n".join(lines))
        return folder


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("installed"))


def test_the_readmes_first_plugin_works_as_it_stands(env: Environment):
    (script,) = re.findall(r"<!-- shell: plugin -->\n```bash\n(.*?)```", PLUGINS_README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (env.folder / "recipes").symlink_to(ROOT / "recipes")
    said = env.call(["sh", "-e", "-c", script])
    assert "my-head registers the head 'my_head'" in said
    assert re.search(r"my_head +│ my-head +│ 0\.1\.0", said)
    assert "every check passes" in said
    (config,) = (env.folder / "runs" / "jepa_mnist").glob("*/config.json")
    saved = json.loads(config.read_text())["modules"]["projector"]
    assert saved == {
        "kind": "head", "name": "my_head", "distribution": "my-head", "version": "0.1.0",
        "kwargs": {"in_dim": 128, "out_dim": 32, "scale": 5},
    }  # fmt: skip


def test_new_plugins_install_are_listed_at_once_and_pass_their_own_tests(env: Environment):
    made = [new_plugin(f"new-{kind}", kind, env.folder) for kind in KINDS]
    env.install(*made)
    listed = env.run("-m", "vitkit", "list")
    for kind in KINDS:
        assert f"new_{kind}" in listed
        assert f"new-{kind} " in listed
    # In one process, which imports torch once.
    tests = [str(folder / "tests") for folder in made]
    said = env.run("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *tests)
    own = sum(file.read_text(encoding="utf-8").count("\ndef test_") - 1 for folder in made for file in (folder / "tests").glob("*.py"))
    assert f"{sum(len(CHECKS[kind]) for kind in KINDS) + own} passed" in said


SAVE = """
    import torch
    from vitkit import heads
    from vitkit.models import save
    save("old", {"head": heads.build("wide", in_dim=3, out_dim=2, hidden=5)},
         preprocessing={}, classes=[], arguments={})
"""
LOAD = """
    import warnings, vitkit
    from vitkit.errors import VitkitError
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            print("built", type(vitkit.load("old").head).__module__)
        except VitkitError as error:
            print(type(error).__name__, error)
    print(*(f"{w.category.__name__} {w.message}" for w in caught))
"""


def test_a_model_says_which_version_of_its_plugin_it_wants(env: Environment):
    wide, older, newer = (
        env.project("wide-heads", version, {"heads.wide": "Head"}, HEAD.format(argument=argument))
        for version, argument in (("2.0", "hidden"), ("1.0", "hidden"), ("3.0", "width"))
    )
    env.install(wide)
    env.run("-c", textwrap.dedent(SAVE))
    env.install(older)
    said = env.run("-c", textwrap.dedent(LOAD))
    assert "built wide_heads" in said
    assert "VersionWarning old/config.json: module 'head' was saved with wide-heads 2.0, installed is 1.0" in said
    env.install(newer)
    said = env.run("-c", textwrap.dedent(LOAD))
    assert "CheckpointError old/config.json: module 'head' cannot be built: head 'wide' takes no argument 'hidden'" in said
    assert "'head' was saved with wide-heads 2.0, installed is 3.0: pip install 'wide-heads==2.0'" in said
    env.pip("uninstall", "--yes", "wide-heads")
    said = env.run("-c", textwrap.dedent(LOAD))
    assert (
        "MissingPluginError old/config.json: module 'head' is the head 'wide' of wide-heads 2.0, which is not installed: "
        "pip install 'wide-heads==2.0'"
    ) in said
    assert "wide" not in env.run("-m", "vitkit", "list", "heads")


def test_mistakes_of_one_plugin_are_named_and_cost_nobody_else(env: Environment):
    point = {"heads.cosine": "Head"}
    command = "def go(): pass\n"
    env.install(
        env.project("first-cosine", "1.0", point, HEAD.format(argument="hidden")),
        env.project("second-cosine", "2.0", point, HEAD.format(argument="hidden")),
        env.project("raises-head", "0.1", {"heads.raises": "Head"}, "raise RuntimeError('out of order')"),
        env.project("three-head", "0.3", {"heads.three": "Head"}, "Head = 3"),
        env.project("slow-head", "1.0", {"heads.slow": "Head"}, "import time\ntime.sleep(10)\n" + HEAD.format(argument="hidden")),
        env.project("no-command", "1.0", {"commands.broken": "go"}, "import no_such_module"),
        env.project("one-command", "1.0", {"commands.go": "go", "commands.list": "go"}, command),
        env.project("two-command", "1.0", {"commands.go": "go"}, command),
    )
    code = """
        import contextlib, io, sys, time
        from vitkit.cli.main import app, guarded
        began = time.perf_counter()
        for words in (["--help"], ["list"]):
            assert guarded(lambda: app(words, prog_name="vitkit"), debug=False) == 0
        print("took", time.perf_counter() - began < 5, "slow_head" in sys.modules)
    """
    said = env.run("-c", textwrap.dedent(code))
    assert "took True False" in said
    for name in ("first-cosine:cosine", "second-cosine:cosine", "raises", "three", "slow"):
        assert name in said
    said = env.run("-m", "vitkit", "doctor", code=1)
    for line in (
        "- head 'raises' of raises-head 0.1 (raises_head:Head) cannot be imported: RuntimeError: out of order; fix it",
        "- head 'three' of three-head 0.3 (three_head:Head) is a int, not a class or function; report it to",
        "- command 'broken' of no-command 1.0 (no_command:go) cannot be imported: ModuleNotFoundError: No module named",
        "note: head 'cosine' is registered by several distributions; first-cosine:cosine names this one",
        "note: command 'go' is registered by several distributions; two-command:go names this one",
        "note: command 'list' of one-command is hidden by vitkit's own; one-command:list runs it",
        "note: slow-head took 10 s to import",
    ):
        assert line in said, said
    assert "4 broken" not in said
    assert "3 broken" in said
    ambiguous = env.run("-m", "vitkit", "show", "head", "cosine", code=2)
    assert "say which: 'first-cosine:cosine' or 'second-cosine:cosine'" in ambiguous
    assert "cosine of second-cosine 2.0" in env.run("-m", "vitkit", "show", "head", "second-cosine:cosine")


def test_an_editable_plugin_follows_its_source_until_it_is_removed(env: Environment):
    folder = env.project("edited-head", "1.0", {"heads.edited": "Head"}, HEAD.format(argument="hidden"))
    env.install(folder, editable=True)
    assert "edited(in_dim: int, out_dim: int, hidden: int = 4)" in env.run("-m", "vitkit", "show", "head", "edited")
    (folder / "edited_head.py").write_text(HEAD.format(argument="width"))
    shown = env.run("-m", "vitkit", "show", "head", "edited")
    assert "edited(in_dim: int, out_dim: int, width: int = 4)" in shown
    assert str(folder / "edited_head.py") in shown
    env.pip("uninstall", "--yes", "edited-head")
    assert "no head named 'edited'" in env.run("-m", "vitkit", "show", "head", "edited", code=2)
