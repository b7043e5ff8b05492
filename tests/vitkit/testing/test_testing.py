"""The conformance kit finds what it looks for, and says how to mend it."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import Scores
from vitkit.cli.main import main
from vitkit.contracts import Measurement
from vitkit.data.dataset import ImageDataset
from vitkit.errors import ConformanceError, UnknownNameError, UsageError
from vitkit.testing import (
    CHECKS,
    Case,
    check_backbone,
    check_dataset,
    check_evaluator,
    check_head,
    check_loss,
    examine,
    find,
)
from vitkit.testing.cases import small_dataset


class Good(nn.Module):
    """A linear map of features `(b in_dim)` → `(b out_dim)`."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


class Undocumented(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Shapeless(Undocumented):
    """A linear map, from in_dim to out_dim."""


class Narrow(Good):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, :1]


class Unused(Good):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.spare = nn.Parameter(torch.zeros(3))


class Detached(Good):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.detach())


class Rooted(Good):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * 0).square().sub(self.linear.bias.square()).abs().sqrt() + x.sum()


class Dropping(Good):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, training=True)


class Centred(Good):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) - self.linear(x).mean(dim=0)


class Counting(Good):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.linear(x)


class Numpy(Good):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.linear.weight.data = torch.from_numpy(np.random.default_rng().normal(size=(out_dim, in_dim))).float()


class Forgetful(Good):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.shift = torch.randn(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.shift


class Doubled(Good):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.double()).float()


class Cancelling(Good):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + 1000 * x.sign()) - self.linear(1000 * x.sign())


class Picky(Good):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0 * x[0].sum()


class Refusing(Good):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise UsageError("needs two samples at least")
        return self.linear(x)


for broken in (Narrow, Unused, Detached, Rooted, Dropping, Centred, Counting, Numpy, Forgetful, Doubled, Cancelling, Picky):
    broken.__doc__ = Good.__doc__
Refusing.__doc__ = Good.__doc__


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (Undocumented, r"\[docstring\] head 'Undocumented' has no docstring; its first sentence is the line"),
        (Shapeless, r"\[docstring\] the docstring of head 'Shapeless' names no shape; write e.g. `\(b d\)`"),
        (Narrow, r"\[shapes\] head 'Narrow': the call gives torch.float32 \(3, 1\) for 3 samples; expected float32 \(3, 4\)"),
        (Unused, r"\[gradients\] head 'Unused': no gradient reaches spare; use them in every forward pass, or leave"),
        (Detached, r"\[gradients\] head 'Detached': no gradient reaches its inputs; nothing before it could be trained"),
        (Rooted, r"\[gradients\] head 'Rooted': the gradient of .* is not finite; look for roots and norms at zero"),
        (Dropping, r"\[modes\] head 'Dropping' draws random numbers in evaluation mode; draw them where self.training"),
        (Centred, r"\[modes\] head 'Centred': output of a sample depends on its neighbours in evaluation mode"),
        (Counting, r"\[modes\] head 'Counting' changes seen in evaluation mode; update them where self.training alone"),
        (Numpy, r"\[determinism\] head 'Numpy': parameters differ between two runs under one seed \(linear.weight\)"),
        (Forgetful, r"\[state\] head 'Forgetful': output differs after loading its state dict; .* persistent buffer"),
        (Doubled, r"\[precision\] head 'Doubled': parameter linear.weight is torch.float64; build it in float32"),
        (Cancelling, r"\[precision\] head 'Cancelling': output under bf16 autocast lies \d+% from fp32's, expected at most 10%"),
        (Picky, r"\[batches\] head 'Picky' fails with a batch of 0: IndexError: .*; give a result, or raise a UsageError"),
    ],
)
def test_a_broken_head_is_told_what_and_how_to_mend_it(head: Callable[..., Any], text: str) -> None:
    with pytest.raises(ConformanceError, match=text):
        check_head(head)


def test_good_and_refusing_heads_pass_and_the_random_state_stays() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    check_head(Good, dropout=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    (result,) = examine(Case("head", "refusing", Refusing, {"in_dim": 3, "out_dim": 2}), ["batches"])
    assert result.seen == "one: refused, none: refused"


def test_what_cannot_be_built_is_said_with_its_arguments() -> None:
    with pytest.raises(ConformanceError, match=r"takes no argument 'hiden'"):
        check_head(Good, hiden=3)
    with pytest.raises(ConformanceError, match="is a dict; expected an nn.Module"):
        check_head(lambda in_dim, out_dim: {}, in_dim=2, out_dim=2)
    with pytest.raises(UsageError, match="no check named 'shape' for a head; did you mean 'shapes'"):
        examine(Case("head", "good", Good, {"in_dim": 3, "out_dim": 2}), ["shape"])


class Patches(nn.Module):
    """Images `(b c h w)` → tokens `(b n d)`."""

    embed_dim = 6
    img_size, in_chans = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 4, stride=4)

    def forward(self, x: Tensor, *, extra_tokens: Tensor | None = None) -> Tensor:
        tokens = self.patches(x).flatten(2).mT.float()
        return tokens if extra_tokens is None else torch.cat([tokens, extra_tokens], dim=1)


class Widthless(Patches):
    embed_dim = "six"


class Deaf(Patches):
    def forward(self, x: Tensor, *, extra_tokens: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Map(Patches):
    def forward(self, x: Tensor, *, extra_tokens: Tensor | None = None) -> Tensor:
        return self.patches(x)


@pytest.mark.parametrize(
    ("backbone", "text"),
    [
        (Widthless, "has embed_dim 'six'; expected the whole number of its tokens' dimensions"),
        (Deaf, r"the call with 2 extra_tokens gives torch.float32 \(3, 4, 6\) for 3 samples; expected float32 \(3, 6, 6\)"),
        (Map, r"the call gives torch.float32 \(3, 6, 2, 2\) for 3 samples; expected float32 \(3, n, 6\)"),
    ],
)
def test_a_broken_backbone_is_told(backbone: Callable[..., Any], text: str) -> None:
    backbone.__doc__ = Patches.__doc__
    check_backbone(Patches)
    with pytest.raises(ConformanceError, match=text):
        check_backbone(backbone)


class Silent(nn.Module):
    """The mean of `(n d)`, on this rank."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.square().mean()}


class MeanOfMeans(Silent):
    """The mean of `(n d)`, on this rank."""

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"x": torch.randn(samples, 4)}


class Unnamed(MeanOfMeans):
    """The mean of `(n d)`, on this rank."""

    def forward(self, x: Tensor) -> Any:
        return x.square().mean()


class Vector(MeanOfMeans):
    """The mean of `(n d)`, on this rank."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.square().mean(), "each": x.square().mean(dim=1)}


def test_a_broken_loss_is_told() -> None:
    with pytest.raises(ConformanceError, match="does not say what it is called with; give its class a static method vitkit_example"):
        check_loss(Silent)
    (result,) = examine(Case("loss", "unnamed", Unnamed, {}, draw=lambda n: {"x": torch.randn(n, 4)}), ["shapes"])
    assert result.problem == "loss 'unnamed' returns Tensor; expected {\"loss\": scalar, part: scalar, ...}"
    (result,) = examine(Case("loss", "vector", Vector, {}, draw=lambda n: {"x": torch.randn(n, 4)}), ["shapes"])
    assert result.problem == "loss 'vector': part 'each' is torch.float32 (3,); expected a scalar tensor of floats"


@pytest.mark.slow
def test_a_mean_of_means_is_found_by_two_ranks() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_loss(MeanOfMeans)
    assert "[ranks] loss 'MeanOfMeans': part loss in two processes is off by" in str(caught.value)
    assert "a mean over it is all_reduce_sum(sum) / all_reduce_sum(count)" in str(caught.value)


def _changed(**fields: Any) -> Callable[[], ImageDataset]:
    from dataclasses import replace

    def shades() -> ImageDataset:
        """Shades."""
        return replace(small_dataset(), **fields)

    return shades


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"classes": ["one"]}, r"\[splits\] dataset 'shades': train.labels name other classes than 0 … 0"),
        ({"licence": ""}, r"\[fields\] dataset 'shades': licence is ''; expected a text that tells a person"),
        ({"test": None}, r"\[splits\] dataset 'shades'.*TypeError"),
    ],
)
def test_a_broken_dataset_is_told(fields: dict[str, Any], text: str) -> None:
    check_dataset(_changed())
    with pytest.raises(ConformanceError, match=text):
        check_dataset(_changed(**fields))


class Brightness:
    """`brightness`, a number."""

    def __call__(self, model: Any, dataset: Any) -> Scores:
        value = float(dataset.test.images.float().mean()) if len(dataset.test) else 0.0
        return Scores({"brightness": value}, protocols={"brightness": Measurement("test", max(len(dataset.test), 1))})


class Bare(Brightness):
    """`brightness`, a number."""

    def __call__(self, model: Any, dataset: Any) -> Scores:
        return Scores(super().__call__(model, dataset))


class Switching(Brightness):
    """`brightness`, a number."""

    def __call__(self, model: Any, dataset: Any) -> Scores:
        model.eval()
        return super().__call__(model, dataset)


class Drawing(Brightness):
    """`brightness`, a number."""

    def __call__(self, model: Any, dataset: Any) -> Scores:
        torch.rand(1)
        return super().__call__(model, dataset)


@pytest.mark.parametrize(
    ("evaluator", "text"),
    [
        (Bare, "brightness has no protocol; say its split and samples"),
        (Switching, "leaves the model in another mode; put every module's .training back"),
        (Drawing, r"moves the random state; wrap it in torch.random.fork_rng\(\)"),
    ],
)
def test_a_broken_evaluator_is_told(evaluator: Callable[..., Any], text: str) -> None:
    check_evaluator(Brightness)
    with pytest.raises(ConformanceError, match=text):
        check_evaluator(evaluator)


def test_names_are_found_by_distribution_name_and_kind() -> None:
    assert {case.kind for case in find("vitkit")} == set(CHECKS)
    assert [str(case) for case in find("vitkit:mlp", norm="batch")] == ["head 'mlp'"]
    with pytest.raises(UnknownNameError, match="nothing installed is called 'lineer'; did you mean 'linear'"):
        find("lineer")
    with pytest.raises(UsageError, match="arguments go with one name, and vitkit registers"):
        find("vitkit", norm="batch")


def test_an_example_of_another_form_is_refused() -> None:
    class Odd(Good):
        vitkit_example = staticmethod(lambda samples: {"in_dim": 3})

    with pytest.raises(ConformanceError, match=r"vitkit_example of head 'Odd' returned .*; expected two dicts"):
        check_head(Odd)


@pytest.mark.parametrize(("words", "code", "text"), [
    (["mlp", "--arg", "norm=batch"], 0, "every check passes"),
    (["mlp", "--arg", "norm=bach"], 2, "head 'mlp': norm is 'bach', expected Literal['layer', 'batch', 'none']"),
    (["linear", "--arg", "in_dim=0"], 2, "in_dim is 0, expected a whole number of at least 1"),
    (["mlp", "--arg", "norm"], 2, "an argument is NAME=VALUE"),
    (["linear", "--kind", "losses"], 2, "nothing installed is called 'linear'"),
])  # fmt: skip
def test_the_command_prints_a_table_and_exits_with_one_on_failure(words, code, text, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["vitkit", "check", *words])
    with pytest.raises(SystemExit) as leaving:
        main()
    said = capsys.readouterr()
    assert leaving.value.code == code
    assert text in said.out + said.err


def test_the_pytest_plugin_imports_no_torch() -> None:
    code = "import sys, vitkit.pytest_plugin; print('torch' in sys.modules, 'vitkit.testing' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False False"
