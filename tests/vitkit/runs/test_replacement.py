"""A kill at any moment of a replacement leaves the earlier run complete, or a run that can be resumed and overwritten."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitkit.errors import RunDirectoryError
from vitkit.runs.directory import REMOVED, REPLACED, claim, read_summary, status_of, trackers_aside

EARLIER = {
    "summary.json": '{"status": "finished", "seed": 1}', "model.safetensors": "weights", "metrics.csv": "epoch", "recipe.py": "old",
    "checkpoints/last.safetensors": "state", "trackers/events": "events",
}  # fmt: skip
NEW = {"status": "running", "seed": 2}

# Ends its process, as a kill does, before the nth change of a file in the directory.
KILLED = """
import os, sys
from pathlib import Path
from vitkit.runs.directory import claim, trackers_aside
directory, trackers = Path(sys.argv[1]), sys.argv[2] == "trackers"
changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
for step in range(1, 200):
    restore = sys.argv[3]
    os.system(f"rm -rf {directory} && cp -r {restore} {directory}-{step}")
    target = Path(f"{directory}-{step}")
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, arguments):
            global count
            if event in changes and str(target) in str(arguments[0]):
                count += 1
                if count == step:
                    os._exit(9)
        held = claim(target, "made", recipe=b"new", resume=False, overwrite=True)
        sys.addaudithook(hook)
        if trackers:
            with trackers_aside(target):
                (target / "trackers").mkdir()
                (target / "trackers" / "new").write_text("new")
        held.open({"status": "running", "seed": 2}, keep=("trackers",) if trackers else ())
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        print(step)
        break
"""


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def files_of(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in directory.rglob("*") if path.is_file() and path.name != ".lock"
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("trackers", ["trackers", "none"])
@pytest.mark.parametrize("missing", [(), ("summary.json",), ("trackers/events", "recipe.py")])
def test_a_kill_at_any_step_leaves_the_earlier_run_or_the_new_one(tmp_path, trackers, missing):
    earlier = {name: text for name, text in EARLIER.items() if name not in missing}
    write(tmp_path / "earlier", earlier)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), trackers, str(tmp_path / "earlier")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 8
    for step in range(1, steps + 1):
        directory = tmp_path / f"run-{step}"
        held = claim(directory, "made", resume=False, overwrite=True)
        held.release()
        assert not {REPLACED, REMOVED} & {path.name for path in directory.iterdir()}
        if read_summary(directory) == NEW:
            assert set(files_of(directory)) <= {"summary.json", "recipe.py", "log.txt", "trackers/new"}, step
            claim(directory, "made", resume=True, overwrite=False).release()
        else:
            assert files_of(directory) == earlier, step


def test_a_summary_that_cannot_be_written_leaves_the_earlier_run(tmp_path, monkeypatch):
    write(tmp_path / "run", EARLIER)
    held = claim(tmp_path / "run", "made", recipe=b"new", resume=False, overwrite=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitkit.runs.directory.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        held.open(NEW)
    held.release()
    assert files_of(tmp_path / "run") == EARLIER


def test_an_earlier_run_without_trackers_gets_none_from_a_start_that_failed(tmp_path):
    write(tmp_path / "run", {"summary.json": EARLIER["summary.json"]})
    with pytest.raises(ValueError, match="no login"), trackers_aside(tmp_path / "run"):
        (tmp_path / "run" / "trackers").mkdir()
        raise ValueError("no login")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_folders_of_a_person_with_the_names_of_ours_stay(tmp_path):
    files = {**EARLIER, f"{REPLACED}/thesis.txt": "years of work", f"{REMOVED}/model.safetensors/thesis.txt": "more", f"{REMOVED}/x": "x"}
    write(tmp_path / "run", files)
    with pytest.raises(RunDirectoryError, match=f"{REPLACED} holds files that no run wrote; move them away, or choose another --out"):
        claim(tmp_path / "run", "made", resume=False, overwrite=True)
    assert files_of(tmp_path / "run") == files


def _start(folder: str, ready, queue) -> None:
    os.chdir(folder)
    ready.wait()
    try:
        queue.put(str(claim(None, "made", resume=False, overwrite=False).directory))
    except RunDirectoryError as error:
        queue.put(f"refused: {error}")
    ready.wait()


def test_runs_that_start_at_the_same_moment_get_directories_of_their_own(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_start, args=(str(tmp_path), ready, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(answers)) == 4
    assert not [answer for answer in answers if answer.startswith("refused")]


def test_a_log_that_is_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    held = claim(tmp_path / "run", "made", resume=False, overwrite=False)
    (tmp_path / "run" / "log.txt").symlink_to(tmp_path / "precious")
    held.open(NEW)
    held.note("a line")
    held.release()
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "run" / "log.txt").read_text().endswith("a line\n")


def test_a_run_whose_process_is_gone_has_stopped(tmp_path):
    held = claim(tmp_path / "run", "made", resume=False, overwrite=False)
    held.open(NEW)
    assert status_of(held.directory, NEW) == "running"
    held.release()
    assert status_of(held.directory, NEW) == "stopped"
    assert status_of(held.directory, {"status": "finished"}) == "finished"
    assert status_of(held.directory, {}) == "unknown"
    assert json.loads((held.directory / "summary.json").read_text()) == NEW  # a reader changes nothing
