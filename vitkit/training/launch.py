"""A recipe, run: what `vitkit run` and `vitkit reproduce` do with it, however it ends."""

import contextlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from vitkit.distributed.watchdog import is_collective
from vitkit.errors import UsageError, VitkitError
from vitkit.training.run import DryRun, Run
from vitkit.training.signals import ignore_termination


def execute(recipe: Any, run_arguments: Mapping[str, Any], arguments: Mapping[str, Any], console: Console) -> int:
    """Run a recipe as `vitkit run` does; the exit code: 0, or 130 after Ctrl-C."""
    run = Run(**run_arguments, name=recipe.name, recipe=recipe, arguments=arguments, console=console)
    try:
        recipe.run(run, arguments)
    except DryRun:
        return 0
    except KeyboardInterrupt:
        told = run.watchdog.failure(wait=1.0)
        if told:  # the launcher stops a job's other ranks when one has failed
            return _stopped_by_another(run, told)
        run.say(f"stopped; {run.way_on()}")
        run.finish("interrupted")
        return 130
    except UsageError as error:
        run.watchdog.tell(error)
        run.discard()
        raise
    except BaseException as error:
        if run.accelerator.num_processes > 1 and is_collective(error):
            ignore_termination()  # the launcher's, which ends all ranks when one has died
            told = run.watchdog.failure(wait=3.0) or "it said nothing, so it was killed or its machine is gone"
            return _stopped_by_another(run, f"{told} ({' '.join(str(error).split()):.200})")
        run.watchdog.tell(error)
        run.note(f"failed: {type(error).__name__}: {error}")
        with contextlib.suppress(VitkitError):  # the first error is the one to tell
            run.finish("failed")
        raise
    run.finish()
    return 0


def _stopped_by_another(run: Run, told: str) -> int:
    """End this rank's part of a job that cannot go on, at once: its launcher may not wait for a report."""
    run.alarm(f"another rank has failed, so this one stops: {told}")
    run.close()
    return 1


__all__ = ["execute"]
