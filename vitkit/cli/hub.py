"""`vitkit push` and `vitkit pull`: runs on the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from vitkit.cli.console import out
from vitkit.errors import printable

LISTED_FILES = 10


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run")],
    name: Annotated[str, typer.Argument(metavar="[OWNER/]NAME", help="the repository; without an owner, your own")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    revision: Annotated[str | None, typer.Option(help="the branch; it is created if it is missing  [default: main]")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request instead of committing to the branch")] = False,
    message: Annotated[str | None, typer.Option(help="the message of the commit")] = None,
    license: Annotated[str, typer.Option(help="the licence of the weights, by its identifier on the Hub")] = "apache-2.0",
    allow_secrets: Annotated[
        bool, typer.Option("--allow-secrets", help="publish files that seem to hold a token or a password")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the files and the model card, without using the network")] = False,
) -> None:
    """Publish a run on the Hugging Face Hub: model, recipe, metrics, plots and a model card written from the run."""
    from vitkit.hub import client

    if dry_run:
        plan = client.plan(run, name, licence=license, allow_secrets=allow_secrets)
        sizes = {**plan.files, "README.md": len(plan.card.encode())}
        for file, size in sizes.items():
            out.print(f"{size:>14,}  {printable(file)}")
        out.print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files for {printable(plan.repo)}\n")
        for line in plan.card.split("\n"):
            out.print(printable(line, 10_000))
        return
    pushed = client.push(
        run, name, private=private, revision=revision, create_pr=create_pr, message=message, licence=license,
        allow_secrets=allow_secrets,
    )  # fmt: skip
    if pushed.card_kept:
        out.print("README.md of the repository was edited by hand, so it stays; delete it there to get a new one")
    out.print(f"{'nothing has changed' if pushed.unchanged else 'pushed'}: {printable(pushed.url)}")


def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="a repository on the Hub")],
    revision: Annotated[str | None, typer.Option(help="a branch, a tag or a commit  [default: main]")] = None,
    directory: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="the new directory  [default: ./NAME]")] = None,
) -> None:
    """Download a run from the Hugging Face Hub into a new directory; none of its code is run."""
    from vitkit.hub import client

    where, others = client.pull(repo, directory, revision=revision)
    for name in others[:LISTED_FILES]:
        out.print(f"left out, not a file of a run: {name!r:.100}")
    if len(others) > LISTED_FILES:
        out.print(f"left out: {len(others) - LISTED_FILES} more")
    out.print(f"pulled {printable(repo)} into {printable(where)}; vitkit.load({str(where)!r}) loads its model")


__all__ = ["pull", "push"]
