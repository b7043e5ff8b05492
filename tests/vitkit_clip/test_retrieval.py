"""Pair retrieval: models whose answers are known, chance, what it leaves alone, and two processes as one."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import backbones, evaluators, heads
from vitkit.contracts import Attention, Confusion, Sheet
from vitkit.data import ImageDataset, ImageSplit, Preprocessing
from vitkit.errors import UsageError, VitkitError
from vitkit_clip import CLIP, PairRetrieval, Pairs, captions, vocabulary_of
from vitkit_eval import rank_relevant

CLASSES = ["ant", "bee", "cat", "dog"]
K = len(CLASSES)
SAID = captions(CLASSES)


def dataset(n: int = 24) -> ImageDataset:
    """8×8 grey images that show their class in their first pixel."""
    labels = torch.arange(n) % K
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 0, 0, 0] = (labels * 60).to(torch.uint8)
    split = ImageSplit(images, labels, Preprocessing((1, 8, 8), (0.0,), (1.0,)))
    return ImageDataset("made", CLASSES, train=split, test=split)


class Reader(nn.Module):
    """Reads both classes off a pair and says them as `2k` numbers; `exchange` takes left for right."""

    def __init__(self, exchange: bool = False, wrong: int | None = None) -> None:
        super().__init__()
        self.exchange, self.wrong = exchange, wrong

    def encode_image(self, x: Tensor) -> Tensor:
        left, right = ((x[:, 0, 0, place] * 255 / 60).round().long() for place in (0, 8))
        if self.wrong is not None:
            right = torch.where(right == self.wrong, (right + 1) % K, right)
        sides = (right, left) if self.exchange else (left, right)
        return torch.cat([F.one_hot(side, K) for side in sides], dim=1).float()


class Speaker(nn.Module):
    """Reads both classes off a caption, in the same numbers."""

    def encode_text(self, texts: list[str]) -> Tensor:
        numbers = torch.tensor([SAID.index(text) for text in texts])
        return torch.cat([F.one_hot(numbers // K, K), F.one_hot(numbers % K, K)], dim=1).float()


class Towers(nn.Module):
    def __init__(self, backbone: nn.Module, text: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone, self.text = backbone, text
        for name, head in heads.items():
            self.add_module(name, head)


def real() -> Towers:
    torch.manual_seed(0)
    return Towers(
        backbones.build(
            "pair_vit", img_size=8, in_chans=1, stem=[8, 16], num_heads=2, mlp_dim=16, depth=2, dropout=0.5
        ),
        backbones.build("text_transformer", vocabulary=vocabulary_of(SAID), embed_dim=16, depth=1, dropout=0.5),
        projector=heads.build("linear", in_dim=16, out_dim=8),
        text_projector=heads.build("linear", in_dim=16, out_dim=8),
    )


def test_a_model_that_knows_finds_everything():
    scores = evaluators.build("pair_retrieval", count=60)(Towers(Reader(), Speaker()), dataset())
    for name in ("i2t_top1", "i2t_map", "i2t_median_rank", "t2i_top1", "t2i_map", "t2i_median_rank"):
        assert scores[name] == 1.0, name
    assert [scores[name] for name in ("left_top1", "right_top1", "zero_shot_top1")] == [1.0, 1.0, 1.0]
    assert [scores[name] for name in ("swapped_top1", "swapped_above")] == [0.0, 0.0]
    assert scores["i2t_top100"] == scores["t2i_recall100"] == 1.0
    assert scores["t2i_recall1"] < 1.0  # a caption with several pairs cannot have them all in first place


def test_left_taken_for_right_is_noticed():
    scores = PairRetrieval(count=60)(Towers(Reader(exchange=True), Speaker()), dataset())
    assert (scores["swapped_top1"], scores["swapped_above"]) == (1.0, 1.0)
    same = 1 - scores.protocols["swapped_top1"].samples / 60
    assert scores["i2t_top1"] == scores["left_top1"] == scores["right_top1"] == pytest.approx(same)
    assert scores["zero_shot_top1"] == 1.0


def test_each_half_is_counted_on_its_own_and_what_is_confused_is_shown():
    data = dataset()
    scores = PairRetrieval(count=60)(Towers(Reader(wrong=2), Speaker()), data)
    left, right = data.test.labels[torch.stack(Pairs(data.test, CLASSES, 1).fixed(0, 60).drawn())]
    assert scores["left_top1"] == 1.0
    assert scores["right_top1"] == scores["i2t_top1"] == pytest.approx(float((right != 2).double().mean()))
    confusion = scores.figures["pair_confusion"]
    assert isinstance(confusion, Confusion)
    assert confusion.matrix[2, 3] == int((right == 2).sum())
    assert confusion.matrix.sum() == 120
    assert confusion.matrix[0, 0] == int((left == 0).sum() + (right == 0).sum())


def test_a_model_that_embeds_everything_at_one_point_scores_chance():
    class Same(nn.Module):
        def encode_image(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 3)

        encode_text = encode_image

    scores = PairRetrieval(count=48)(Towers(Same(), Same()), dataset())
    by_choice = ("left_top1", "right_top1", "swapped_top1")  # these take the first of the nearest captions
    ranked = {name: value for name, value in scores.items() if name not in by_choice and "median" not in name}
    assert ranked == pytest.approx({name: scores.protocols[name].chance for name in ranked})
    assert scores["left_top1"] == pytest.approx(0.25)


def test_kinds_and_directions():
    protocols = PairRetrieval(count=48)(real(), dataset()).protocols
    assert {name for name, protocol in protocols.items() if protocol.kind == "error"} == {"i2t_median_rank", "t2i_median_rank"}
    assert {name for name, protocol in protocols.items() if protocol.kind == "score"} == {"i2t_map", "t2i_map"}
    lower = {name for name, protocol in protocols.items() if protocol.direction == "min"}
    assert lower == {"i2t_median_rank", "t2i_median_rank", "swapped_top1", "swapped_above"}


def test_on_the_validation_split_names_and_protocols_say_so():
    data = dataset()
    with_val = replace(data, test=data.train.subset(torch.arange(8)))
    object.__setattr__(with_val, "val", data.test)
    expected, scores = PairRetrieval(count=40)(real(), data), PairRetrieval(count=40)(real(), with_val, split="val")
    assert scores == {f"val_{name}": value for name, value in expected.items()}
    assert set(scores.figures) == {f"val_{name}" for name in expected.figures}
    assert {protocol.split for protocol in scores.protocols.values()} == {"val"}


def test_the_order_of_the_classes_does_not_matter():
    data, turned = dataset(), [2, 0, 3, 1]
    classes = [CLASSES[turned.index(number)] for number in range(K)]  # label l of `data` is label turned[l] here
    other = replace(data, classes=classes, test=replace(data.test, labels=torch.tensor(turned)[data.test.labels]))
    model = Towers(Reader(wrong=2), Speaker())
    first, second = (PairRetrieval(count=2000)(model, one) for one in (data, other))
    for name in ("i2t_top1", "left_top1", "right_top1", "zero_shot_top1", "t2i_recall10"):
        assert second[name] == pytest.approx(first[name], abs=0.05), name
    assert second["left_top1"] == 1.0


def test_images_without_a_label_are_refused_before_anything_is_encoded():
    data = dataset()
    hidden = replace(data, test=data.test.mask_labels(0.5))
    with pytest.raises(UsageError, match="pair_retrieval needs labels, but 12 of 24 test images of made have none"):
        PairRetrieval().check(hidden)


def test_protocols_say_chance_and_how_many():
    scores = PairRetrieval(count=60, zero_shot=12)(real(), dataset())
    assert list(scores) == [
        "i2t_top1", "i2t_top10", "i2t_top100", "i2t_map", "i2t_median_rank",
        "t2i_top1", "t2i_top10", "t2i_top100", "t2i_recall1", "t2i_recall10", "t2i_recall100", "t2i_map", "t2i_median_rank",
        "left_top1", "right_top1", "swapped_top1", "swapped_above", "zero_shot_top1",
    ]  # fmt: skip
    protocols = scores.protocols
    assert set(protocols) == set(scores)
    chance = {name: protocol.chance for name, protocol in protocols.items()}
    assert chance["i2t_top1"] == pytest.approx(1 / 16)
    assert (chance["i2t_top100"], chance["i2t_median_rank"]) == (1.0, 8.0)
    assert (chance["left_top1"], chance["swapped_top1"], chance["swapped_above"]) == (0.25, 1 / 16, 0.5)
    assert chance["t2i_recall10"] == pytest.approx(10 / 60)
    assert (protocols["i2t_top1"].samples, protocols["i2t_top1"].note) == (60, "pair → caption, among 16 captions")
    assert protocols["t2i_top1"].samples == 16
    assert (protocols["zero_shot_top1"].samples, protocols["zero_shot_top1"].chance) == (12, 0.25)
    assert protocols["zero_shot_top1"].note.startswith("one image on both halves against the 4 captions")


def test_pictures_fit_together():
    figures = PairRetrieval(count=60, shown=3)(real(), dataset()).figures
    assert set(figures) == {"pair_hits", "pair_misses", "pair_attention", "pair_confusion", "zero_shot_confusion"}
    misses, attention = figures["pair_misses"], figures["pair_attention"]
    assert isinstance(misses, Sheet)
    assert misses.images.shape == (3, 1, 8, 16)
    assert all(re.fullmatch(r".+ \| .+\nplace [\d,]+, first\n.+ \| .+", caption) for caption in misses.captions)
    assert isinstance(attention, Attention)
    assert attention.images.shape == (3, 1, 8, 16)
    assert attention.maps.shape[2] == 2 * attention.maps.shape[1]
    assert attention.maps.max() == pytest.approx(1.0)
    bare = PairRetrieval(count=20, shown=0, zero_shot=0)(Towers(Reader(), Speaker()), dataset())
    assert set(bare.figures) == {"pair_confusion"}
    assert "zero_shot_top1" not in bare


def test_batch_size_changes_nothing_and_all_is_left_as_it_was():
    model, state = real().train(), torch.get_rng_state()
    whole, cut = (PairRetrieval(count=60, batch_size=size)(model, dataset()) for size in (60, 7))
    assert whole == pytest.approx(cut)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_model_that_keeps_its_captions_is_asked_for_them():
    towers = real()
    model = CLIP(towers.backbone, towers.text, towers.projector, towers.text_projector, nn.Identity(), SAID)
    assert PairRetrieval(count=60)(model, dataset()) == pytest.approx(PairRetrieval(count=60)(towers, dataset()))
    towers.text.requires_grad_(False)
    frozen = CLIP(towers.backbone, towers.text, towers.projector, towers.text_projector, nn.Identity(), SAID)
    PairRetrieval(count=60)(frozen, dataset())
    frozen.text.encode_text = None  # what it said is kept
    PairRetrieval(count=60)(frozen, dataset())


def results() -> dict[str, float]:
    queries, items = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    ranking = rank_relevant(queries, items, torch.arange(40) % 7, torch.arange(40), cells=100)
    # Seven a batch: the ranks' shares differ, and one is empty.
    scores = PairRetrieval(count=57, batch_size=7)(real(), dataset(15))
    return {**scores, **{f"rank{number}": place for number, place in enumerate(ranking.ranks.tolist())}}


def _worker(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.save(results(), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_rank_as_one(tmp_path: Path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    alone = results()
    for number in range(2):
        assert torch.load(tmp_path / f"{number}.pt", weights_only=True) == pytest.approx(alone)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from vitkit.data import ImageSplit, Preprocessing
from vitkit.data import ImageDataset
from vitkit_clip import PairRetrieval
torch.set_num_threads(1)

class Tower(nn.Module):  # as wide as a real one, and next to no work
    def encode_image(self, x): return x.flatten(1)[:, :64]
    def encode_text(self, texts): return torch.randn(len(texts), 64)

classes = [str(number) for number in range(100)]
split = ImageSplit(torch.randint(0, 256, (10_000, 1, 8, 8), dtype=torch.uint8), torch.arange(10_000) % 100,
                   Preprocessing((1, 8, 8), (0.0,), (1.0,)))
model, data = nn.Module(), ImageDataset("made", classes, train=split, test=split)
model.backbone = model.text = Tower()
def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
linux = sys.platform == "linux"
if linux:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which importing left, is forgotten
before = status("VmRSS") if linux else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
scores = PairRetrieval()(model, data)
assert scores.protocols["i2t_top1"].samples == 10_000 and "10,000 captions" in scores.protocols["i2t_top1"].note
print(((status("VmHWM") if linux else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024) - before) / 1024)
"""


@pytest.mark.slow
def test_ten_thousand_against_ten_thousand_in_little_memory():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300  # MiB; the matrix of all scores alone is 381


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PairRetrieval(count=0), "count is 0; expected at least 1"),
        (lambda: PairRetrieval(zero_shot=-1), "zero_shot is -1; expected at least 0"),
        (
            lambda: PairRetrieval()(nn.Linear(2, 2), dataset()),
            "needs a model with a 'backbone' and a 'text' that offers encode_text; Linear has no text: train one with",
        ),
        (
            lambda: PairRetrieval(count=9)(Towers(Reader(), Speaker(), projector=nn.Linear(8, 3)), dataset()),
            "pairs are embedded in 3 dimensions, captions in 8; both projectors need the same out_dim",
        ),
        (
            lambda: PairRetrieval(count=9)(
                Towers(Reader(), Speaker()), ImageDataset("one", ["a"], train=dataset().train, test=dataset().test)
            ),
            "at least two classes; given 1",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_a_diverged_model_is_named():
    model = real()
    nn.init.constant_(next(model.projector.parameters()), torch.nan)
    with pytest.raises(VitkitError, match="the embeddings of pairs are not finite"):
        PairRetrieval(count=9)(model, dataset())
