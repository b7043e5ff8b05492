"""Pairs find their captions among all captions, and captions their pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.contracts import Attention, Confusion, Measurement, ReportFigure, Scores, Sheet
from vitkit.data import Preprocessing
from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError, VitkitError
from vitkit.models import Features, encode_image, evaluating
from vitkit_clip.pairs import FIXED, Pairs, captions
from vitkit_clip.text import vocabulary_of
from vitkit_eval import Ranking, adapted, classification, confusion_matrix, rank_relevant, retrieval_scores

TOPS = (1, 10, 100)
TEXTS = 500
"""Captions encoded at once."""
LOOKED_AT = 256
"""Among so many pairs the pictures' hits and misses are sought."""


class PairRetrieval:
    """Fixed test pairs against all k² captions, both ways: `i2t_*` and `t2i_*`, each with its chance level.

    | column                        | what                                                                            |
    |-------------------------------|---------------------------------------------------------------------------------|
    | `i2t_top1`, `_top10`, `_top100` | share of pairs whose caption is among the nearest 1, 10, 100 (R@k: a pair has one) |
    | `t2i_top1`, …                 | share of captions with a pair of theirs among the nearest 1, 10, 100 of all pairs |
    | `t2i_recall1`, …              | R@k: the share of a caption's pairs among its nearest k, mean over captions     |
    | `i2t_map`, `t2i_map`          | mean average precision                                                          |
    | `i2t_median_rank`, `t2i_…`    | median place of the (first) right one, from 1                                   |
    | `left_top1`, `right_top1`     | share of pairs whose nearest caption names the left, the right class            |
    | `swapped_top1`                | of pairs of two classes: the nearest caption is theirs, left and right exchanged |
    | `swapped_above`               | of pairs of two classes: that caption is at least as near as their own          |
    | `zero_shot_top1` (`_top5`)    | single test images, see below                                                   |

    Nearness is the cosine of `projector(backbone.encode_image(pair))` and `text_projector(text.encode_text([caption]))`;
    a model without one of the projectors goes without. In `t2i_*` a caption that no pair shows is no query. Ties are decided
    against the model, see `vitkit_eval.rank_relevant`. In zero-shot classification a single image stands on both halves, and
    the k captions that name one class on both sides are its candidates: that way nothing else is in the picture.

    The pairs are `Pairs(...).fixed(seed, count)` of the test split. `zero_shot` test images, the classes as evenly as they
    can be had, are classified; 0 leaves that out. `shown` pairs stand in each picture. Scores are computed in pieces: no
    n × k² matrix is ever in memory. Called under autocast the towers compute in its precision, cosines are fp32. A model
    that keeps what its frozen text tower says of these captions (`vitkit_clip.CLIP`) is asked for it.

    Ranks: each encodes its share of the pairs and captions and ranks its share of the queries; every rank returns the same.

    Raises `UsageError` for a model without `backbone` and a `text` that offers `encode_text`, for towers whose spaces differ
    in width, for numbers out of range, and as `Pairs`; `VitkitError` for embeddings that are not finite.

    Source: top-1, top-10 and top-100 over the 10,000 captions of CIFAR-100 pairs follow the report that this system started
    from; R@k, mAP and median rank are those of the retrieval literature.
    """

    def __init__(
        self, *, count: int = FIXED, seed: int = 0, batch_size: int = 500, zero_shot: int = 2_000, shown: int = 8
    ) -> None:
        for name, value, least in (
            ("count", count, 1), ("batch_size", batch_size, 1), ("zero_shot", zero_shot, 0), ("shown", shown, 0)
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"{name} is {value}, expected at least {least}")
        self.count, self.seed, self.batch_size, self.zero_shot, self.shown = count, seed, batch_size, zero_shot, shown

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = nn.Module()
        model.backbone = backbones.build(
            "vit", img_size=(8, 16), patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=1
        )
        names = [str(number) for number in range(100)]
        model.text = backbones.build(
            "text_transformer",
            vocabulary=vocabulary_of([*captions(["x", "y"]), *names, "class"]),
            embed_dim=16,
            depth=1,
        )
        model.projector = heads.build("linear", in_dim=16, out_dim=8)
        model.text_projector = heads.build("linear", in_dim=16, out_dim=8)
        return {"count": samples, "batch_size": 8}, {"model": model}

    def __call__(self, model: Any, dataset: Any) -> Scores:
        check_towers(model)
        classes: list[str] = list(dataset.classes)
        # A saved model says how it is shown a pair; a dataset that was prepared for it has images of a pair's size.
        test = adapted(dataset.test, half_of(model)) if hasattr(model, "preprocessing") else dataset.test
        pairs = Pairs(test, classes, self.batch_size).fixed(self.seed, self.count)
        said = captions(classes)
        with evaluating(model) as device:
            seen = _embed_pairs(model, pairs, device)
            texts = caption_embeddings(model, said)
            check_embeddings(seen.embeddings, texts)
            numbers = torch.arange(len(seen.labels), device=device)
            i2t = rank_relevant(seen.embeddings, texts, numbers, seen.labels)
            t2i = rank_relevant(texts, seen.embeddings, seen.labels, numbers)
            zero = self._classify(model, pairs, texts, device) if self.zero_shot else Scores()
            figures = self._figures(model, pairs, i2t, device)
        frozen = "both encoders and their projectors"
        found = [
            retrieval_scores("i2t", i2t, TOPS, frozen=frozen, note=f"pair → caption, among {len(said):,} captions"),
            retrieval_scores("t2i", t2i, TOPS, frozen=frozen, note=f"caption → pair, among {len(numbers):,} pairs", recalls=True),
            self._halves(seen, texts, i2t, classes, frozen),
            zero,
        ]  # fmt: skip
        return Scores(
            {name: value for scores in found for name, value in scores.items()},
            protocols={name: protocol for scores in found for name, protocol in scores.protocols.items()},
            figures=figures | {name: figure for scores in found for name, figure in scores.figures.items()},
        )

    def _halves(self, seen: "Seen", texts: Tensor, i2t: Ranking, classes: list[str], frozen: str) -> Scores:
        """What the nearest caption says of each half, and how often it says it of the other."""
        k, n = len(classes), len(seen.labels)
        left, right = seen.labels // k, seen.labels % k
        chosen_left, chosen_right = i2t.nearest // k, i2t.nearest % k
        swapped = right * k + left
        two = left != right
        own, other = (
            F.cosine_similarity(seen.embeddings[two], texts[numbers[two]]) for numbers in (seen.labels, swapped)
        )
        values = {"left_top1": _share(chosen_left == left), "right_top1": _share(chosen_right == right)}
        notes = {
            name: Measurement("test", n, 1 / k, frozen, f"the {side} class in the nearest of {k * k:,} captions")
            for name, side in (("left_top1", "left"), ("right_top1", "right"))
        }
        if bool(two.any()):
            of_two = int(two.sum())
            values["swapped_top1"] = _share((i2t.nearest == swapped)[two])
            values["swapped_above"] = _share(other >= own)
            note = "of pairs of two classes: left and right exchanged in the nearest caption"
            notes["swapped_top1"] = Measurement("test", of_two, 1 / k**2, frozen, note)
            note = "of pairs of two classes: the caption with left and right exchanged is at least as near as their own"
            notes["swapped_above"] = Measurement("test", of_two, 0.5, frozen, note)
        counts = confusion_matrix(torch.cat([left, right]), torch.cat([chosen_left, chosen_right]), k)
        return Scores(
            values,
            protocols=notes,
            figures={"pair_confusion": Confusion(counts.cpu().numpy(), classes)},
        )

    def _classify(self, model: Any, pairs: Pairs, texts: Tensor, device: torch.device) -> Scores:
        """Single images on both halves against the captions that name one class twice."""
        k = len(pairs.classes)
        split = pairs.split.stratified_subset(self.zero_shot, seed=self.seed)
        twice = F.normalize(texts[torch.arange(k, device=texts.device) * (k + 1)], dim=1)
        scores, labels = [], []
        for batch in split.batches(self.batch_size).epoch(0, device=device, rank=rank(), world=world_size()):
            pair = torch.cat([batch["images"], batch["images"]], dim=-1)
            scores.append(all_gather(F.normalize(embed_images(model, pair), dim=1) @ twice.T))
            labels.append(all_gather(batch["labels"]))
        found = Features(torch.cat(scores), torch.cat(labels))
        note = f"one image on both halves against the {k} captions that name one class twice, cosine"
        return classification("zero_shot", found.features, found, list(pairs.classes), note=note)

    def _figures(self, model: Any, pairs: Pairs, i2t: Ranking, device: torch.device) -> dict[str, ReportFigure]:
        """Hits, misses and attention, from the first pairs."""
        if not self.shown:
            return {}
        few = Pairs(pairs.split, pairs.classes, LOOKED_AT).fixed(self.seed, self.count)
        batch, preprocessing, classes = next(iter(few.epoch(0, device=device))), pairs.split.preprocessing, pairs.classes
        mean, std = (torch.tensor(moments, device=device)[:, None, None] for moments in (preprocessing.mean, preprocessing.std))
        images = (batch["images"] * std + mean).clamp(0, 1).cpu()
        k = len(classes)
        figures: dict[str, ReportFigure] = {}

        def named(number: int) -> str:
            return f"{classes[number // k]} | {classes[number % k]}"

        own, places, nearest = batch["labels"].tolist(), i2t.ranks.tolist(), i2t.nearest.tolist()
        hits = [i for i in range(len(images)) if places[i] == 1][: self.shown]
        misses = [i for i in range(len(images)) if places[i] > 1][: self.shown]
        told = {i: named(own[i]) for i in hits}
        told |= {i: f"{named(own[i])}\nplace {places[i]:,}, first\n{named(nearest[i])}" for i in misses}
        for name, chosen in (("pair_hits", hits), ("pair_misses", misses)):
            if chosen:
                figures[name] = Sheet(images[chosen].numpy(), [told[i] for i in chosen], columns=4)
        maps = _attention(model.backbone, batch["images"][: self.shown])
        if maps is not None:
            labels = [named(number) for number in own[: self.shown]]
            figures["pair_attention"] = Attention(images[: self.shown].numpy(), maps.cpu().numpy(), labels)
        return figures


@dataclass(frozen=True)
class Seen:
    """Embeddings float32 `(n d)` of pairs and the numbers int64 `(n,)` of their captions."""

    embeddings: Tensor
    labels: Tensor


def check_towers(model: Any) -> None:
    """`UsageError` for a model that cannot compare images with texts."""
    text = getattr(model, "text", None)
    if not hasattr(text, "encode_text") or getattr(model, "backbone", None) is None:
        raise UsageError(
            f"comparing pictures with captions needs a model with a 'backbone' and a 'text' that offers encode_text; "
            f"{type(model).__name__} has {'no text' if text is None else 'a text of type ' + type(text).__name__}: train one "
            f"with recipes/clip_cifar100.py"
        )


def half_of(model: Any) -> Preprocessing:
    """How one half of a pair is made for a saved model; `UsageError` where it does not say how, or takes no pairs."""
    if not model.preprocessing:
        raise UsageError("this model was saved without preprocessing, so no picture can be shown to it")
    whole = Preprocessing.from_json(model.preprocessing)
    channels, height, width = whole.shape
    if width % 2:
        raise UsageError(
            f"this model takes pictures of {height}×{width} pixels, which are no pairs: their width is odd"
        )
    return replace(whole, shape=(channels, height, width // 2))


def embed_images(model: Any, images: Tensor) -> Tensor:
    """Images as the model takes them `(b c h w)` → embeddings float32 `(b d)`, not normalised."""
    count = len(images)
    if count == 0:  # one rank's share of the last batch: a model need not take it, and any image tells the width
        images = images.new_zeros(1, *images.shape[1:])
    return _projected(model, "projector", encode_image(model.backbone, images))[:count]


def embed_texts(model: Any, texts: Sequence[str]) -> Tensor:
    """Texts → embeddings float32 `(n d)`, not normalised; `TEXTS` of them at a time, in the order given."""
    parts = (texts[first : first + TEXTS] for first in range(0, len(texts), TEXTS))
    return torch.cat([_projected(model, "text_projector", model.text.encode_text(list(part))) for part in parts])


def caption_embeddings(model: Any, said: Sequence[str]) -> Tensor:
    """The captions' embeddings float32 `(k² d)`, on every rank: each encodes its share."""
    parts = torch.arange(len(said)).tensor_split(world_size())
    own, count = parts[rank()], len(parts[rank()])
    if count == 0:  # more ranks than captions: any of them tells the width
        own = parts[0][:1]
    if getattr(model, "captions", None) == list(said):  # it may have kept what its text tower says of them
        found = torch.cat([model.embed_captions(part).float() for part in own.split(TEXTS)])
    else:
        found = embed_texts(model, [said[number] for number in own.tolist()])
    return all_gather(found[:count])


def _projected(model: Any, name: str, features: Tensor) -> Tensor:
    projector = getattr(model, name, None)
    return (features if projector is None else projector(features)).float()


def _embed_pairs(model: Any, pairs: Pairs, device: torch.device) -> Seen:
    embeddings, labels = [], []
    for batch in pairs.epoch(0, device=device, rank=rank(), world=world_size()):
        embeddings.append(all_gather(embed_images(model, batch["images"])))
        labels.append(all_gather(batch["labels"]))
    return Seen(torch.cat(embeddings), torch.cat(labels))


def check_embeddings(seen: Tensor, texts: Tensor) -> None:
    """`UsageError` where pairs `(n d)` and captions `(m d)` have no common space, `VitkitError` where they are not finite."""
    if seen.shape[1] != texts.shape[1]:
        raise UsageError(
            f"pairs are embedded in {seen.shape[1]} dimensions, captions in {texts.shape[1]}; both projectors must lead into "
            f"one space"
        )
    for what, embeddings in (("pairs", seen), ("captions", texts)):
        if not bool(embeddings.isfinite().all()):
            raise VitkitError(
                f"the embeddings of {what} are not finite: the model has diverged, or its weights are damaged"
            )


def _share(hits: Tensor) -> float:
    return float(hits.cpu().double().mean())  # not every accelerator computes in fp64


def _attention(backbone: Any, images: Tensor) -> Tensor | None:
    """Maps `(b rows columns)` over both halves, the strongest part of each at 1, of a backbone that offers them."""
    look = getattr(backbone, "attention_maps", None)
    if look is None:
        return None
    try:
        maps: Tensor = look(images).float()
    except UsageError:  # no block of this one sees both halves
        return None
    if maps.ndim != 3:
        return None
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
