"""The conformance kit finds mistakes, and its messages say how to fix them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import Scores
from vitkit.cli.main import main
from vitkit.contracts import Measurement, SplitName
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


class Terse(Undocumented):
    """some map"""


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
        (Narrow, r"\[shapes\] head 'Narrow': the call gives torch.float32 \(3, 1\) for 3 samples; expected float32 \(3, 4\)"),
        (Unused, r"\[gradients\] head 'Unused': no gradient reaches spare; use them in every forward pass, or leave"),
        (Detached, r"\[gradients\] head 'Detached': no gradient reaches its inputs; modules before it could not be trained"),
        (Rooted, r"\[gradients\] head 'Rooted': the gradient of .* is not finite; look for roots and norms at zero"),
        (Dropping, r"\[modes\] head 'Dropping' draws random numbers in evaluation mode; draw them only where self.training"),
        (Centred, r"\[modes\] head 'Centred': output of a sample depends on its neighbours in evaluation mode"),
        (Counting, r"\[modes\] head 'Counting' changes seen in evaluation mode; update them only where self.training"),
        (Numpy, r"\[determinism\] head 'Numpy': parameters differ between two runs under one seed \(linear.weight\)"),
        (Forgetful, r"\[state\] head 'Forgetful': output differs after loading its state dict; .* persistent buffers"),
        (Doubled, r"\[precision\] head 'Doubled': parameter linear.weight is torch.float64; build it in float32"),
        (Cancelling, r"\[precision\] head 'Cancelling': output under bf16 autocast lies \d+% from fp32's, expected at most 10%"),
        (Picky, r"\[batches\] head 'Picky' fails with a batch of 0: IndexError: .*; give a result, or raise a UsageError"),
    ],
)
def test_each_mistake_of_a_head_is_named_with_its_fix(head: Callable[..., Any], text: str) -> None:
    with pytest.raises(ConformanceError, match=text):
        check_head(head)


def test_good_and_refusing_heads_pass_and_the_random_state_stays() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    check_head(Good, dropout=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    (result,) = examine(Case("head", "refusing", Refusing, {"in_dim": 3, "out_dim": 2}), ["batches"])
    assert result.seen == "one: refused, none: refused"


def test_a_head_that_cannot_be_built_is_named_with_its_arguments() -> None:
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
        (Widthless, "has embed_dim 'six'; expected the number of its tokens' dimensions, a whole number"),
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
    with pytest.raises(ConformanceError, match="does not declare its inputs; give its class a static method vitkit_example"):
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
    def shades() -> ImageDataset:
        """Shades."""
        return replace(small_dataset(), **fields)

    return shades


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"classes": ["one"]}, r"\[splits\] dataset 'shades': train.labels name other classes than 0 … 0"),
        ({"licence": ""}, r"\[fields\] dataset 'shades': licence is ''; expected a text for a person"),
        ({"test": None}, r"\[splits\] dataset 'shades'.*TypeError"),
    ],
)
def test_a_broken_dataset_is_told(fields: dict[str, Any], text: str) -> None:
    check_dataset(_changed())
    with pytest.raises(ConformanceError, match=text):
        check_dataset(_changed(**fields))


class Brightness:
    """`brightness` of the images, a number in [0, 255]."""

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        part = getattr(dataset, split)
        value = float(part.images.float().mean()) if len(part) else 0.0
        scores = Scores({"brightness": value}, protocols={"brightness": Measurement(split, max(len(part), 1))})
        return scores.prefixed("val_") if split == "val" else scores


class Bare(Brightness):
    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        return Scores(dict(super().__call__(model, dataset, split)))


class Switching(Brightness):
    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        model.eval()
        return super().__call__(model, dataset, split)


class Drawing(Brightness):
    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        torch.rand(1)
        return super().__call__(model, dataset, split)


class Splitless(Brightness):
    def __call__(self, model: Any, dataset: Any) -> Scores:
        return super().__call__(model, dataset)


class Unprefixed(Brightness):
    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        scores = super().__call__(model, dataset, split)
        return Scores({"brightness": next(iter(scores.values()))}, protocols={"brightness": next(iter(scores.protocols.values()))})


class AlwaysTest(Brightness):
    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        return super().__call__(model, dataset).prefixed("val_" if split == "val" else "")


class Peeking(Brightness):
    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        scores = super().__call__(model, dataset, split)
        return Scores({name: value + len(dataset.test) for name, value in scores.items()}, protocols=scores.protocols)


class Fickle(Brightness):
    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        scores = super().__call__(model, dataset, split)
        more = Scores({"x": 1.0}, protocols={"x": Measurement(split, 1)}) if split == "test" else Scores()
        return scores | more


def _measured(**fields: Any) -> type[Brightness]:
    """An evaluator whose protocol has other fields."""

    class Measured(Brightness):
        """`brightness`, with another protocol."""

        def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
            scores = super().__call__(model, dataset, split)
            protocols = {name: replace(protocol, **fields) for name, protocol in scores.protocols.items()}
            return Scores({name: -value for name, value in scores.items()}, protocols=protocols)

    return Measured


for changed in (Bare, Switching, Drawing, Splitless, Unprefixed, AlwaysTest, Peeking, Fickle):
    changed.__doc__ = Brightness.__doc__


@pytest.mark.parametrize(
    ("evaluator", "text"),
    [
        (Bare, "brightness has no protocol; state its split and samples"),
        (Switching, "leaves the model in another mode; restore every module's .training"),
        (Drawing, r"moves the random state; wrap it in torch.random.fork_rng\(\)"),
        (Splitless, r"\[val\] evaluator 'Splitless' cannot be called with split='val' .*evaluator\(model, dataset, split='test'\)"),
        (Unprefixed, r"\[val\] .* on the validation split brightness does not begin with 'val_'; return scores.prefixed\('val_'\)"),
        (AlwaysTest, r"\[val\] .* the protocol of val_brightness has split 'test'; expected 'val'"),
        (Peeking, r"\[val\] .* scores of the validation split depend on test images"),
        (Fickle, r"\[val\] .* the metrics of the two splits differ in val_x; measure the same on both"),
        (_measured(kind="percentage"), "brightness has kind 'percentage'; expected 'proportion', 'error', 'score'"),
        (_measured(kind="proportion"), r"brightness is -\d+(\.\d+)?; expected a proportion in \[0, 1\], or kind 'score'"),
        (_measured(kind="error"), r"brightness is -\d+(\.\d+)?; expected an error of at least 0, or kind 'score'"),
        (_measured(direction="up"), "brightness has direction 'up'; expected 'max' or 'min'"),
    ],
)
def test_each_mistake_of_an_evaluator_is_named(evaluator: Callable[..., Any], text: str) -> None:
    with pytest.raises(ConformanceError, match=text):
        check_evaluator(evaluator)


def test_a_good_evaluator_passes() -> None:
    check_evaluator(Brightness)


class Offering(MeanOfMeans):
    """The mean of `(n d)`, on this rank."""

    value: Any = None

    def uninformed(self, batch_size: int) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"loss": 1.0}, ""),
        ({}, ""),
        (0.5, "loss 'offering': uninformed(3) is 0.5; expected finite numbers by part"),
        ({"loss": float("nan")}, "loss 'offering': uninformed(3) is {'loss': nan}; expected finite numbers by part"),
        ({"lss": 1.0}, "loss 'offering': uninformed names lss; expected parts of the loss: loss"),
    ],
)
def test_the_value_of_an_uninformed_prediction_is_optional_and_checked_where_offered(
    value: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Offering, "value", value)
    (result,) = examine(Case("loss", "offering", Offering, {}, draw=lambda n: {"x": torch.randn(n, 4)}), ["uninformed"])
    assert result.problem == problem
    (result,) = examine(Case("loss", "silent", Silent, {}, draw=lambda n: {"x": torch.randn(n, 4)}), ["uninformed"])
    assert (result.problem, result.seen) == ("", "not offered")


def test_words_of_a_docstring_are_remarks_and_no_failures() -> None:
    case = Case("loss", "terse", Terse, {"in_dim": 3, "out_dim": 2})
    (result,) = examine(case, ["docstring"])
    assert result.problem == ""
    assert "loss 'terse' begins with 'some map'; `vitkit list` shows it; write a full sentence" in result.notes[0]
    assert result.notes[1:] == (
        "the docstring of loss 'terse' does not explain its argument in_dim, out_dim",
        "the docstring of loss 'terse' names no shape, such as `(b d)` → `(b k)`",
        "the docstring of loss 'terse' does not describe its computation across ranks",
    )
    (result,) = examine(Case("loss", "none", Undocumented, {"in_dim": 3, "out_dim": 2}), ["docstring"])
    assert "has no docstring" in result.problem


def test_arguments_that_may_open_files_or_addresses_are_named() -> None:
    def head(in_dim: int, out_dim: int, checkpoint_path: str = "", pretrained: bool = False, cache_dir: str = "", profile: int = 0) -> Good:
        """A linear map of features `(b in_dim)` → `(b out_dim)`."""
        return Good(in_dim, out_dim)

    (result,) = examine(Case("head", "loader", head, {"in_dim": 3, "out_dim": 2}), ["arguments"])
    assert result.problem == ""
    assert result.seen == "refused on load: checkpoint_path, pretrained, cache_dir"
    assert "head 'loader' takes checkpoint_path, pretrained, cache_dir: vitkit.load refuses them" in result.notes[0]
    (result,) = examine(Case("head", "plain", Good, {"in_dim": 3, "out_dim": 2}), ["arguments"])
    assert (result.seen, result.notes) == ("architecture only", ())
    (result,) = examine(Case("head", "plain", head, {"in_dim": 3, "out_dim": 2, "cache_dir": "x"}), ["arguments"])
    assert result.seen == "not loadable"
    assert "a model that is saved with this example cannot be loaded: head 'plain': cache_dir is 'x'" in result.notes[1]


def test_an_image_may_be_unlabelled_and_a_class_has_one_name() -> None:
    dataset = small_dataset()
    hidden = replace(dataset.train, labels=torch.full_like(dataset.train.labels, -1))
    check_dataset(_changed(train=hidden))
    with pytest.raises(ConformanceError, match="classes name one class twice"):
        check_dataset(_changed(classes=["dark", "dark", "light"]))


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
    (["linear", "--arg", "in_dim=0"], 2, "in_dim is 0; expected at least 1"),
    (["mlp", "--arg", "norm"], 2, "an argument is NAME=VALUE"),
    (["linear", "--kind", "losses"], 2, "nothing installed is called 'linear'"),
])  # fmt: skip
def test_the_command_prints_a_table_and_exits_with_one_on_failure(words, code, text, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["vitkit", "check", *words])
    with pytest.raises(SystemExit) as leaving:
        main()
    printed = capsys.readouterr()
    assert leaving.value.code == code
    assert text in printed.out + printed.err


def test_the_pytest_plugin_imports_no_torch() -> None:
    code = "import sys, vitkit.pytest_plugin; print('torch' in sys.modules, 'vitkit.testing' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False False"
