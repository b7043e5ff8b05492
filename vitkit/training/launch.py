"""Running a recipe: the common part of `vitkit run` and `vitkit reproduce`, however the recipe ends."""

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
    session = run.session
    try:
        with Signals():
            recipe.run(run, flags)
    except DryRun:
        return 0
    except KeyboardInterrupt:
        reason = session.watchdog.failure(wait=1.0)
        if reason:  # the launcher stops the other ranks of a job when one has failed
            return _stop_with_another(session, reason)
        session.say(f"stopped; {session.how_to_resume()}")
        run.finish("interrupted")
        return 130
    except UsageError as error:
        session.watchdog.tell(error)
        run.save_after_error()
        run.discard()
        raise
    except BaseException as error:
        if session.accelerator.num_processes > 1 and is_collective(error):
            ignore_termination()  # the launcher ends all ranks when one has died
            reason = session.watchdog.failure(wait=3.0) or "it said nothing, so it was killed or its machine is gone"
            return _stop_with_another(session, f"{reason} ({' '.join(str(error).split()):.200})")
        session.watchdog.tell(error)
        session.note(f"failed: {type(error).__name__}: {error}")
        with contextlib.suppress(VitkitError):  # the first error is the one to report
            run.save_after_error()
            run.finish("failed")
        raise
    run.finish()
    return 0


def _stop_with_another(session: Session, reason: str) -> int:
    """End this rank at once after another has failed: its launcher may not wait for a report."""
    session.alarm(f"another rank has failed, so this one stops: {reason}")
    session.close()
    return 1


__all__ = ["execute"]
