"""`vitkit push` and `vitkit pull`: runs and the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run")],
    name: Annotated[str, typer.Argument(metavar="[OWNER/]NAME", help="the repository; without an owner your own")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    revision: Annotated[str | None, typer.Option(help="the branch; made where it is missing")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="propose it as a pull request")] = False,
    message: Annotated[str | None, typer.Option(help="the commit's message")] = None,
    license: Annotated[str, typer.Option(help="the licence of the weights, as the Hub writes it")] = "apache-2.0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the files and the card; no network")] = False,
) -> None:
    """Publish a run on the Hugging Face Hub: model, recipe, metrics, plots and a model card written from the run."""
    from vitkit.hub import client

    if dry_run:
        plan = client.plan(run, name, licence=license)
        sizes = {**plan.files, "README.md": len(plan.card.encode())}
        for file, size in sizes.items():
            out.print(f"{size:>14,}  {file}", markup=False)
        out.print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files for {plan.repo}\n", markup=False)
        out.print(plan.card, markup=False)
        return
    done = client.push(
        run, name, private=private, revision=revision, create_pr=create_pr, message=message, licence=license
    )
    if done.card_kept:
        out.print("README.md there was edited by hand and stays as it is; delete it there for a new one", markup=False)
    out.print(f"{'nothing has changed' if done.unchanged else 'pushed'}: {done.url}", markup=False)


def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="a repository on the Hub")],
    revision: Annotated[str | None, typer.Option(help="a branch, a tag or a commit")] = None,
    directory: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="default: ./NAME")] = None,
) -> None:
    """Fetch a run from the Hugging Face Hub into a new directory; no code from it is run."""
    from vitkit.hub import client

    where, others = client.pull(repo, directory, revision=revision)
    for name in others[:10]:
        out.print(f"left out, not a file of a run: {name!r:.100}", markup=False)
    if len(others) > 10:
        out.print(f"left out besides: {len(others) - 10} more", markup=False)
    out.print(f"pulled {repo} into {where}; vitkit.load({str(where)!r}) loads its model", markup=False)


__all__ = ["pull", "push"]
