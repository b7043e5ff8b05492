"""The command line, as a person types it: what it prints, where it stops, and with which exit code."""

import json
import subprocess
import sys
import textwrap
from importlib.metadata import distributions

import pytest

from vitkit.cli.main import main

RECIPE = '''
"""A line through points."""
import os
import signal
from typing import Annotated, Literal
import torch
from torch import nn
from vitkit import Run

class Points:
    def __len__(self): return 4
    def epoch(self, number, *, seed=0, start=0, device="cpu", rank=0, world=1):
        for index in range(start, 4):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(100 * number + index))
            yield {"images": x, "labels": x.sum(1)}

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)
    def forward(self, batch):
        return {"loss": (self.fc(batch["images"]).squeeze(1) - batch["labels"]).square().mean()}

def main(run: Run, epochs: Annotated[int, "passes"] = 2, lr: float = 0.1, multimodal: bool = True,
         kind: Literal["a", "b"] = "a", sizes: list[int] = [1], fail: bool = False, stop: bool = False):
    """Fit it."""
    run.say("a name \\x1b[2Jfrom [b]elsewhere[/]\\nsecond")
    if fail:
        raise ValueError("inside [the] recipe")
    model = Line()
    for epoch in run.fit(model, Points(), epochs=epochs, optimizer=torch.optim.SGD(model.parameters(), lr=lr)):
        epoch.log(top1=0.5)
        if stop and epoch.number == 2 and not run.resuming:
            os.kill(os.getpid(), signal.SIGINT)
'''


@pytest.fixture
def vitkit(tmp_path, shell):
    """`vitkit("run", ...)` in a directory that holds line.py, within this process: importing torch takes seconds."""
    (tmp_path / "line.py").write_text(RECIPE)
    return shell


def test_help_list_and_version_import_no_torch():
    code = textwrap.dedent("""
        import sys, typer
        from vitkit.cli.main import app
        for arguments in (["--help"], ["--version"], ["list"], ["data", "--help"], ["run", "--help"]):
            try:
                app(arguments, prog_name="vitkit", standalone_mode=False)
            except (SystemExit, typer.Exit):
                pass
        print([name for name in ("torch", "numpy", "matplotlib", "accelerate") if name in sys.modules])
    """)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.strip().endswith("[]")


def test_list_and_show(vitkit):
    listed = vitkit("list", "heads")
    assert listed.returncode == 0
    assert "linear" in listed.stdout
    assert "backbones" not in listed.stdout
    assert "vitkit 0" in vitkit("--version").stdout
    answer = vitkit("show", "backbone", "vit")
    assert "patch_size: int = 4" in answer.stdout
    assert "vit.py" in answer.stdout
    wrong = vitkit("list", "hed")
    assert wrong.returncode == 2
    assert "no kind named 'hed'; did you mean 'head'?" in wrong.stderr
    unknown = vitkit("show", "head", "lineer")
    assert unknown.returncode == 2
    assert "did you mean 'linear'? known: " in unknown.stderr


def test_a_recipe_runs_and_leaves_a_run_behind(vitkit, tmp_path):
    done = vitkit("run", "line.py", "--epochs", "3", "--no-multimodal", "--sizes", "3", "--sizes", "4", "--out", "here")
    assert done.returncode == 0, done.stderr
    assert "epoch 3/3 | loss" in done.stderr
    line = "a name \\x1b[2Jfrom [b]elsewhere[/] second\n"
    assert line in done.stderr
    assert line in (tmp_path / "here" / "log.txt").read_text()
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["arguments"] == {
        "epochs": 3, "lr": 0.1, "multimodal": False, "kind": "a", "sizes": [3, 4], "fail": False,
        "stop": False,
    }  # fmt: skip
    assert summary["command"] == "vitkit run line.py --epochs 3 --no-multimodal --sizes 3 --sizes 4"
    assert (tmp_path / "here" / "recipe.py").read_text() == RECIPE
    again = vitkit("run", "line.py", "--out", "here")
    assert again.returncode == 2
    assert "already holds a finished run" in again.stderr


def test_help_shows_the_recipes_flags_and_the_runs(vitkit):
    answer = vitkit("run", "line.py", "--help").stdout
    for text in ("A line through points.", "--epochs", "passes", "--multimodal", "--no-multimodal", "<a|b>", "--grad-accum"):
        assert text in answer


def test_dry_run_shows_values_and_the_models_cost_and_trains_nothing(vitkit, tmp_path):
    answer = vitkit("run", "line.py", "--dry-run", "--lr", "0.5", "--out", "nowhere")
    assert answer.returncode == 0, answer.stderr
    for text in ("lr", "0.5", "parameters", "4 (4 trained)", "FLOPs"):
        assert text in answer.stderr
    assert not (tmp_path / "nowhere").exists()


def test_dry_run_on_devices_shows_what_a_run_on_so_many_needs(vitkit):
    answer = vitkit("run", "line.py", "--dry-run", "--devices", "8")
    assert answer.returncode == 0, answer.stderr
    for text in ("on 8 devices", "a parameter", "fully sharded", "device-hours", "989 TFLOP/s"):
        assert text in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["run"], 2, "no recipe is given; give its file"),
        (["run", "nothing.py"], 2, "no recipe at nothing.py; there are line.py"),
        (["run", "line.py", "--epohcs", "3"], 2, "--epochs"),
        (["run", "line.py", "--epochs", "many"], 2, "valid integer"),
        (["run", "line.py", "--kind", "c"], 2, "'c' is not one of 'a', 'b'"),
        (["run", "line.py", "--epochs", "0"], 2, "epochs is 0; expected at least 1"),
        (["run", "line.py", "--lr", "nan"], 2, "lr is nan; expected a finite learning rate"),
        (["run", "line.py", "--devices", "8"], 2, "--devices 8 estimates the memory and time of a run on that many devices"),
        (["run", "line.py", "--dry-run", "--devices", "0"], 2, "--devices 0: expected at least 1"),
        (["run", "line.py", "--device", "cuda"], 2, "--device cuda: this machine has cpu"),
        (["run", "line.py", "--lr", "1e30"], 1, "the loss is not finite at epoch"),
        (["run", "line.py", "--fail"], 1, "ValueError: inside [the] recipe"),
        (["run", "line.py", "--out", "/proc/nowhere"], 1, "cannot write to /proc/nowhere"),
        (["run", "line.py", "--resume"], 2, "no unfinished run under runs/line"),
        (["nothing"], 2, "no command named"),
        (["compare", "nowhere", "line.py"], 2, "no run at nowhere"),
    ],
)
def test_bad_input_is_answered_with_one_message_and_no_traceback(vitkit, arguments, code, text):
    answer = vitkit(*arguments)
    assert answer.returncode == code, answer.stderr
    assert text in " ".join(answer.stderr.replace("│", " ").split())
    assert "Traceback" not in answer.stderr


def test_what_is_refused_leaves_no_directory_behind(vitkit, tmp_path):
    assert vitkit("run", "line.py", "--epochs", "0", "--out", "here").returncode == 2
    assert not (tmp_path / "here").exists()
    assert vitkit("run", "line.py", "--out", "here").returncode == 0


def test_debug_lets_the_traceback_through(tmp_path, monkeypatch):
    (tmp_path / "line.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vitkit", "run", "line.py", "--fail", "--debug"])
    with pytest.raises(ValueError, match=r"inside \[the\] recipe"):
        main()


def test_resuming_takes_the_flags_that_the_run_was_started_with(vitkit, tmp_path):
    first = vitkit("run", "line.py", "--epochs", "2", "--lr", "1e30", "--out", "here")
    assert first.returncode == 1
    changed = vitkit("run", "line.py", "--out", "here", "--resume", "--lr", "0.1")
    assert changed.returncode == 2
    assert "--lr was 1e+30 when here was started and is now 0.1" in changed.stderr
    same = vitkit("run", "line.py", "--out", "here", "--resume")
    assert same.returncode == 1
    assert "not finite" in same.stderr


def test_ctrl_c_prints_the_command_that_goes_on(vitkit, tmp_path):
    stopped = vitkit("run", "line.py", "--epochs", "4", "--stop", "--out", "here")
    assert stopped.returncode == 130
    assert "stopped; resume with: vitkit run line.py --epochs 4 --stop --out here --resume" in stopped.stderr
    assert json.loads((tmp_path / "here" / "summary.json").read_text())["status"] == "interrupted"
    resumed = vitkit("run", "line.py", "--out", "here", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at epoch 2" in resumed.stderr
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert (summary["status"], summary["epochs"], summary["arguments"]["epochs"]) == ("finished", 4, 4)


def test_doctor_names_what_is_broken(vitkit, install):
    whole = vitkit("doctor")
    assert whole.returncode == 0, whole.stdout
    assert "nothing is broken" in whole.stdout
    install("broken-one", "0.1", {"heads": {"x": "broken_one:X"}}, broken_one="import no_such_module")
    broken = vitkit("doctor")
    assert broken.returncode == 1
    assert "head 'x' of broken-one 0.1 (broken_one:X) cannot be imported: ModuleNotFoundError" in broken.stdout


def test_a_plugin_adds_a_command(vitkit, install):
    install("greeter", "1.0", {"commands": {"greet": "greeter:greet"}}, greeter=(
        "from typing import Annotated\n"
        "import typer\n"
        "def greet(name: str, times: Annotated[int, typer.Option(help='how often')] = 1):\n"
        "    \"\"\"Say hello.\"\"\"\n"
        "    print('hello ' * times + name)\n"
    ))  # fmt: skip
    assert "Say hello." in vitkit("--help").stdout
    assert "greeter" not in sys.modules
    assert vitkit("greet", "you", "--times", "2").stdout == "hello hello you\n"
    assert "how often" in vitkit("greet", "--help").stdout
    near = vitkit("gret")
    assert near.returncode == 2
    assert "no command named 'gret'; did you mean 'greet'?" in near.stderr


def test_help_looks_through_what_is_installed_once(vitkit, install, monkeypatch):
    for number in range(3):
        install(f"greeter{number}", "1.0", {"commands": {f"greet{number}": "greeter:greet"}})
    looks = []
    monkeypatch.setattr("vitkit.registry.distributions", lambda: looks.append(1) or distributions())
    answer = vitkit("--help").stdout
    assert all(f"greet{number}" in answer for number in range(3))
    assert len(looks) == 1


def test_a_broken_command_costs_itself_alone(vitkit, install):
    install("breaker", "1.0", {"commands": {"smash": "breaker:smash"}}, breaker="raise RuntimeError('no luck')")
    assert vitkit("--help").returncode == 0
    broken = vitkit("smash")
    assert broken.returncode == 1
    assert "command 'smash' of breaker 1.0 (breaker:smash) cannot be imported: RuntimeError: no luck" in broken.stderr
