"""A recipe is read in one sitting: its lines of code and its own flags are bounded, and earlier flags keep working."""

import ast
import io
import tokenize
from itertools import pairwise
from pathlib import Path

import pytest

from vitkit.cli.run import run
from vitkit.training import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("jepa_mnist", "vae_mnist", "vae_cifar10", "clip_cifar100", "finetune")
FILES = (*NAMES, "mae_cifar10", "dino_cifar10", "ssl_cifar10")
LINES, FLAGS = 70, 15
REFERENCE_FLAGS = {
    # Named in the reference documents: as flags, or as settings of the training with their values.
    "epochs", "batch_size", "lr", "depth", "num_heads", "embed_dim", "patch_size", "proj_dim", "multimodal", "eval_every",
    "triplet", "classification", "reconstruction", "kl", "schedule", "supervised", "conditional",
    "weight_decay", "warmup", "patience", "different",
}  # fmt: skip
MADE_BY_THE_RUNNER = {"dataset", "preset"}
EARLIER = {
    "jepa_mnist": "--emb-dim 32 --objective seed --projector mlp --projector-arg hidden=8 --lamda 0.1 --views 2 --swap 0.5 --keep 0.5",
    "vae_mnist": "--emb-dim 32 --latent-dim 8 --stem patch --hierarchical --checkpoint --weighting progressive --kl-warmup 0.1 "
    "--kl-reduction image --reconstruction-kind bce --reconstruction-reduction image --mining given --margin 0.3 --views 1 "
    "--transfer-to digits --transfer-features embedding --no-supervised --schedule step --optimizer adamw --eval-size 9",
    "vae_cifar10": "--emb-dim 32 --randaugment 3 --mix 0.5 --label-smoothing 0.2 --conditional --triplet 1 --no-checkpoint",
    "clip_cifar100": "--temperature learned --augment seed --loss focal_nce --text auto --freeze-text --chunk 8 --mix cutmix "
    "--no-caption-positives --augment-pair stacked --different 0.4 --ema 0.9 --classify 0.5 --label-smoothing 0 --proj-dim 8",
}


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments and docstrings."""
    source = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in skipped]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


@pytest.mark.parametrize("path", [*(RECIPES / f"{name}.py" for name in FILES), Path(__file__).parent / "byol.py"], ids=lambda p: p.stem)
def test_a_recipe_is_short(path):
    assert code_lines(path) <= LINES
    flags = {flag for flag in Recipe(path).flags if not flag.endswith("_arg")}
    assert len(flags - REFERENCE_FLAGS - MADE_BY_THE_RUNNER) <= FLAGS


@pytest.mark.parametrize("name", FILES)
def test_help_shows_every_flag_in_full_on_a_terminal_of_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run(RECIPES / f"{name}.py", ["--help"])
    text = capsys.readouterr().out
    words = text.split()
    assert {f"--{flag.replace('_', '-')}" for flag in Recipe(RECIPES / f"{name}.py").flags} <= set(words)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", EARLIER)
def test_earlier_flags_keep_working(name):
    recipe = Recipe(RECIPES / f"{name}.py")
    words = recipe.rewrite(EARLIER[name].split())
    flags = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in words if word.startswith("--")}
    assert flags <= set(recipe.flags)


def test_earlier_flags_of_the_vae_set_arguments_of_components():
    words = Recipe(RECIPES / "vae_mnist.py").rewrite(EARLIER["vae_mnist"].split())
    pairs = list(pairwise(words))
    for flag, argument in (
        ("--encoder-arg", "latent_dim=8"), ("--encoder-arg", "stem=patch"), ("--encoder-arg", "depths=all"),
        ("--encoder-arg", "checkpoint=true"), ("--loss-arg", "mode=progressive"), ("--kl-loss-arg", "reduction=image"),
        ("--triplet-loss-arg", "mining=given"), ("--triplet-loss-arg", "margin=0.3"), ("--transfer-arg", "dataset=digits"),
        ("--transfer-arg", "features=embedding"), ("--reconstruction-loss-arg", "kind=bce"),
    ):  # fmt: skip
        assert (flag, argument) in pairs
