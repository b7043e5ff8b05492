"""What several tests need: made-up installed distributions, and the store of real images where there is one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# One thread: sums on the CPU depend on their number in the last bit, and two wait for each other on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`install("my-dist", "1.0", {"heads": {"name": "module:attr"}}, module="source")` puts a plugin on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(name: str, version: str, points: dict[str, dict[str, str]], **modules: str) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        groups = (
            f"[vitkit.{group}]\n" + "\n".join(f"{key} = {value}" for key, value in names.items())
            for group, names in points.items()
        )
        (info / "entry_points.txt").write_text("\n".join(groups))
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        return site

    return add


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`shell("run", ...)` answers as `vitkit run ...` in `tmp_path` would, within this process: importing torch takes seconds."""
    from vitkit.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["vitkit", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        printed = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, leaving.value.code, printed.out, printed.err)

    return call


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The store of real images; tests that need it skip where VITKIT_DATA names none."""
    folder = Path(os.environ.get("VITKIT_DATA", ""))
    missing = [name for name in ("mnist", "fashion_mnist", "cifar10", "cifar100") if not (folder / f"{name}.safetensors").exists()]
    if not os.environ.get("VITKIT_DATA") or missing:
        pytest.skip("needs the real images: set VITKIT_DATA to a store that holds all four datasets")
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short JEPA run on digits, trained through the command line's own path."""
    from vitkit.cli.run import run

    directory = tmp_path_factory.mktemp("trained") / "run"
    recipe = Path(__file__).parent.parent / "recipes" / "jepa_mnist.py"
    with pytest.raises(SystemExit) as leaving:
        run(recipe, ["--dataset", "digits", "--epochs", "6", "--eval-every", "3", "--out", str(directory)])
    assert leaving.value.code == 0
    return directory
