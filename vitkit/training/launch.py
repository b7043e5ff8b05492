"""Running a recipe for `vitkit run` and `vitkit reproduce`, and ending the run, whether the recipe returns or raises."""

import contextlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from vitkit.distributed.watchdog import is_collective
from vitkit.errors import UsageError, VitkitError
from vitkit.training.recipe import Recipe
from vitkit.training.run import DryRun, Run
from vitkit.training.session import Session
from vitkit.training.signals import Signals, ignore_termination


def execute(recipe: Recipe, settings: Mapping[str, Any], flags: Mapping[str, Any], console: Console) -> int:
    """Run a recipe with the runner's settings and the requested values of its flags.

    Returns the exit code: 0, 130 after Ctrl-C, SIGTERM or SIGHUP, or 1 if another rank has failed.
    """
    run = Run(**settings, name=recipe.name, recipe=recipe, arguments=flags, console=console)
    with Signals() as signals:
        try:
            recipe.run(run, flags)
        except BaseException as error:
            with signals.deferred():
                return _end(run, error)
    run.finish()
    return 0


def _end(run: Run, error: BaseException) -> int:
    """End a run whose recipe raised `error`: returns the exit code, or raises the error again."""
    session = run.session
    if isinstance(error, DryRun):
        return 0
    collective = _collective_error(error) if session.accelerator.num_processes > 1 else None
    if collective is not None:
        ignore_termination()  # the launcher ends all ranks when one has died
        reason = session.watchdog.failure(wait=3.0) or "it left no message: its process was killed, or its machine stopped"
        return _stop_with_another(session, f"{reason} ({' '.join(str(collective).split()):.200})")
    if isinstance(error, KeyboardInterrupt):
        reason = session.watchdog.failure(wait=1.0)
        if reason:  # the launcher stops the other ranks of a job when one has failed
            return _stop_with_another(session, reason)
        session.say(f"stopped; {session.how_to_resume()}")
        run.finish("interrupted")
        return 130
    session.watchdog.tell(error)
    if isinstance(error, UsageError):
        run.save_after_error()
        run.discard()
    else:
        session.note(f"failed: {type(error).__name__}: {error}")
        with contextlib.suppress(VitkitError):  # the first error is the one to report
            run.save_after_error()
            run.finish("failed")
    raise error


def _collective_error(error: BaseException | None) -> BaseException | None:
    """The error of a collective among `error` and the errors it was raised from: SIGTERM may arrive while the first is handled."""
    while error is not None and not is_collective(error):
        error = error.__context__
    return error


def _stop_with_another(session: Session, reason: str) -> int:
    """End this rank at once after another has failed: its launcher may not wait for a report."""
    session.alarm(f"another rank has failed, so this one stops: {reason}")
    session.close()
    return 1


__all__ = ["execute"]
