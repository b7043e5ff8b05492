"""Loads saved models in a process that notes every socket, and every file outside of Python, the packages and the model.

`python load_attacked.py DIRECTORY...` prints, a JSON line each, the message of the refusal (or null where the model was loaded) and the
forbidden events. Components are imported before the watch begins: an import reads files of its package.
"""

import contextlib
import json
import os
import site
import socket
import sys
import sysconfig
import warnings
from pathlib import Path

WATCHED = {
    "open": 0, "os.listdir": 0, "os.scandir": 0, "os.mkdir": 0, "os.remove": 0, "os.rename": 1, "os.symlink": 1, "os.chdir": 0,
    "shutil.copyfile": 0, "pathlib.Path.glob": 0,
}  # fmt: skip
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "urllib.", "http.", "ftplib.", "pickle.",
             "marshal.loads", "ctypes.dlopen", "webbrowser.")  # fmt: skip
ALLOWED = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/lib/ssl", "/usr/share/zoneinfo", "/etc/localtime", "/etc/mime.types")


def main(directories: list[str]) -> None:
    import vitkit
    from vitkit.errors import VitkitError

    for kind in ("backbone", "head", "loss"):
        for entry in vitkit.REGISTRIES[kind].entries():
            entry.load()
    load = vitkit.load
    packages = {sys.prefix, sys.base_prefix, *site.getsitepackages(), *sysconfig.get_paths().values()}
    files = [str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())]
    sources = {str(Path(file).parent) for file in files if Path(file).is_absolute()}  # torch.ops says "_ops.py"
    always = (*ALLOWED, *{os.path.realpath(path) for path in packages | sources})
    events: list[str] = []
    allowed: tuple[str, ...] = ()
    real: dict[str, str] = {}
    watching = False

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal watching
        if not watching:
            return
        if event.startswith(FORBIDDEN) and not _is_import():
            events.append(f"{event} {arguments!r:.200}")
        elif event in WATCHED:
            target = arguments[WATCHED[event]]
            if isinstance(target, int) or target is None:
                return
            watching = False
            name = os.fsdecode(target)
            path = real.get(name) or real.setdefault(name, os.path.realpath(name))
            watching = True
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if not path.startswith(allowed) or (writes and not path.endswith(".pyc")):
                events.append(f"{event} {path}")

    sys.addaudithook(watch)
    warnings.simplefilter("ignore")
    allowed, watching = tuple(always), True
    for forbidden in (lambda: open("bait.pt").close(), lambda: os.listdir("/etc"), lambda: socket.socket().close()):
        events.clear()
        with contextlib.suppress(OSError):
            forbidden()
        if not events:
            raise SystemExit("the watch does not see what it is for")
    watching = False
    for directory in directories:
        allowed = (os.path.realpath(directory), *always)
        events.clear()
        message: str | None = None
        watching = True
        try:
            load(directory)
        except VitkitError as error:
            message = str(error)
        except Exception as error:
            message = f"unexpected {type(error).__name__}: {error}"
        watching = False
        print(json.dumps({"directory": directory, "message": message, "events": events}), flush=True)


def _is_import() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
