"""Retrieval between pairs of images and all captions, both ways."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.contracts import Attention, Confusion, Measurement, ReportFigure, Scores, Sheet, SplitName
from vitkit.data import Preprocessing
from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError, VitkitError
from vitkit.models import encode_image, evaluating
from vitkit.validation import at_least
from vitkit_clip.pairs import FIXED, Pairs, captions
from vitkit_clip.text import vocabulary_of
from vitkit_eval import (
    Ranking,
    adapted,
    check_labels,
    classification,
    confusion_matrix,
    named,
    places,
    rank_relevant,
    retrieval_scores,
    share_in_top,
    split_of,
)

TOPS = (1, 10, 100)
TEXTS_AT_ONCE = 500
FIGURE_PAIRS = 256
"""Number of pairs, from the first one, among which the figures' hits and misses are chosen."""


class PairRetrieval:
    """Fixed pairs of a split against all k² captions, both ways: `i2t_*` and `t2i_*`, each with its chance level.

    | column                        | meaning                                                                         |
    |-------------------------------|---------------------------------------------------------------------------------|
    | `i2t_top1`, `_top10`, `_top100` | share of pairs whose caption is among the nearest 1, 10, 100 (R@k: a pair has one) |
    | `t2i_top1`, …                 | share of captions with a pair of theirs among the nearest 1, 10, 100 of all pairs |
    | `t2i_recall1`, …              | R@k: the share of a caption's pairs among its nearest k, mean over captions     |
    | `i2t_map`, `t2i_map`          | mean average precision                                                          |
    | `i2t_median_rank`, `t2i_…`    | median place of the (first) right one, from 1                                   |
    | `left_top1`, `right_top1`     | share of pairs whose nearest caption names the left, the right class            |
    | `swapped_top1`                | of pairs of two classes: the nearest caption is theirs, left and right exchanged |
    | `swapped_above`               | of pairs of two classes: that caption is nearer than their own                  |
    | `zero_shot_top1` (`_top5`)    | single images, see below                                                        |

    Nearness is the cosine of `projector(backbone.encode_image(pair))` and `text_projector(text.encode_text([caption]))`;
    a projector that the model lacks is left out. In `t2i_*` a caption that no pair shows is not a query. Equal cosines
    share their places, see `vitkit_eval.ties`. In zero-shot classification a single image stands on both halves, and
    the k captions that name one class on both sides are its candidates, so that the pair shows one class only. Captions
    are made from the dataset's class names, so that no metric depends on the order of the classes.

    The pairs are `Pairs(...).fixed(seed, count)` of the split. `zero_shot` single images, the classes in equal shares as
    far as possible, are classified; 0 skips this. Each figure has `shown` pairs. Scores are computed in pieces: no n × k²
    matrix is ever in memory. Under autocast the towers compute in the precision of autocast; cosines are fp32. A model that
    caches its frozen text tower's features of these captions (`vitkit_clip.CLIP`) computes them once.

    Ranks: each rank encodes its share of the pairs and captions and ranks its share of the queries. All ranks return the
    same scores.

    Raises `UsageError` if the model has no `backbone` or no `text` with `encode_text`, the spaces of the towers differ in
    width, a number is out of range, or an image has no label. Other errors are those of `Pairs`, and `VitkitError` if
    embeddings are not finite.

    Source: top-1, top-10 and top-100 over the 10,000 captions of CIFAR-100 pairs follow the reference document of this
    system; R@k, mAP and median rank are those of the retrieval literature.
    """

    name = "pair_retrieval"

    def __init__(
        self, *, count: int = FIXED, seed: int = 0, batch_size: int = 500, zero_shot: int = 2_000, shown: int = 8
    ) -> None:
        at_least(1, count=count, batch_size=batch_size)
        at_least(0, zero_shot=zero_shot, shown=shown)
        self.count, self.seed, self.batch_size, self.zero_shot, self.shown = count, seed, batch_size, zero_shot, shown

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = nn.Module()
        model.backbone = backbones.build(
            "vitkit:vit", img_size=(8, 16), patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=1
        )
        names = [str(number) for number in range(100)]
        model.text = backbones.build(
            "vitkit:text_transformer",
            vocabulary=vocabulary_of([*captions(["x", "y"]), *names, "class"]),
            embed_dim=16,
            depth=1,
        )
        model.projector = heads.build("vitkit:linear", in_dim=16, out_dim=8)
        model.text_projector = heads.build("vitkit:linear", in_dim=16, out_dim=8)
        return {"count": samples, "batch_size": 8}, {"model": model}

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if pairs and captions cannot be made of this split."""
        captions(dataset.classes)
        check_labels(self.name, dataset, split)
        Pairs(split_of(dataset, split), dataset.classes, self.batch_size)

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        check_towers(model)
        self.check(dataset, split)
        classes: list[str] = list(dataset.classes)
        images = split_of(dataset, split)
        # A saved model names the size of its pairs; a dataset that was prepared for it has images of that size.
        images = adapted(images, half_of(model)) if hasattr(model, "preprocessing") else images
        pairs = Pairs(images, classes, self.batch_size).fixed(self.seed, self.count)
        all_captions = captions(classes)
        with evaluating(model) as device:
            embedded = _embed_pairs(model, pairs, device)
            texts = caption_embeddings(model, all_captions)
            check_embeddings(embedded.embeddings, texts)
            numbers = torch.arange(len(embedded.labels), device=device)
            i2t = rank_relevant(embedded.embeddings, texts, numbers, embedded.labels)
            t2i = rank_relevant(texts, embedded.embeddings, embedded.labels, numbers)
            zero_shot = self._classify(model, pairs, texts, device, split) if self.zero_shot else Scores()
            figures = self._figures(model, pairs, i2t, device)
        shared: dict[str, Any] = {"frozen": "both encoders and their projectors", "split": split}
        note = f"pair → caption, among {len(all_captions):,} captions"
        scores = retrieval_scores("i2t", i2t, TOPS, note=note, **shared)
        note = f"caption → pair, among {len(numbers):,} pairs"
        scores |= retrieval_scores("t2i", t2i, TOPS, note=note, recalls=True, **shared)
        scores |= _halves(embedded, texts, i2t, classes, **shared)
        scores |= zero_shot
        scores.figures |= figures
        return named(scores, split)

    def _classify(self, model: Any, pairs: Pairs, texts: Tensor, device: torch.device, split: SplitName) -> Scores:
        """Single images on both halves against the captions that name one class twice."""
        k = len(pairs.classes)
        images = pairs.split.stratified_subset(self.zero_shot, seed=self.seed)
        twice = F.normalize(texts[torch.arange(k, device=texts.device) * (k + 1)], dim=1)
        scores, labels = [], []
        for batch in images.batches(self.batch_size).epoch(0, device=device, rank=rank(), world=world_size()):
            pair = torch.cat([batch["images"], batch["images"]], dim=-1)
            scores.append(all_gather(F.normalize(embed_images(model, pair), dim=1) @ twice.T))
            labels.append(all_gather(batch["labels"]))
        note = f"one image on both halves against the {k} captions that name one class twice, cosine"
        return classification("zero_shot", torch.cat(scores), torch.cat(labels), list(pairs.classes), split=split, note=note)

    def _figures(self, model: Any, pairs: Pairs, i2t: Ranking, device: torch.device) -> dict[str, ReportFigure]:
        """Hits, misses and attention, from the first pairs."""
        if not self.shown:
            return {}
        few = Pairs(pairs.split, pairs.classes, FIGURE_PAIRS).fixed(self.seed, self.count)
        batch, preprocessing, classes = next(iter(few.epoch(0, device=device))), pairs.split.preprocessing, pairs.classes
        mean, std = (torch.tensor(moments, device=device)[:, None, None] for moments in (preprocessing.mean, preprocessing.std))
        images = (batch["images"] * std + mean).clamp(0, 1).cpu()
        k = len(classes)
        figures: dict[str, ReportFigure] = {}

        def pair_name(number: int) -> str:
            return f"{classes[number // k]} | {classes[number % k]}"

        labels, ranks, nearest = batch["labels"].tolist(), i2t.ranks.tolist(), i2t.nearest.tolist()
        hits = [i for i in range(len(images)) if ranks[i] == 1][: self.shown]
        misses = [i for i in range(len(images)) if ranks[i] > 1][: self.shown]
        texts = {i: pair_name(labels[i]) for i in hits}
        texts |= {i: f"{pair_name(labels[i])}\nplace {ranks[i]:,.0f}, first\n{pair_name(nearest[i])}" for i in misses}
        for name, chosen in (("pair_hits", hits), ("pair_misses", misses)):
            if chosen:
                figures[name] = Sheet(images[chosen].numpy(), [texts[i] for i in chosen], columns=4)
        maps = _attention(model.backbone, batch["images"][: self.shown])
        if maps is not None:
            names = [pair_name(number) for number in labels[: self.shown]]
            figures["pair_attention"] = Attention(images[: self.shown].numpy(), maps.cpu().numpy(), names)
        return figures


def _halves(
    embedded: "EmbeddedPairs", texts: Tensor, i2t: Ranking, classes: list[str], *, frozen: str, split: SplitName
) -> Scores:
    """The classes that the nearest caption names left and right, and how often it exchanges them."""
    k, n = len(classes), len(embedded.labels)
    left, right = embedded.labels // k, embedded.labels % k
    chosen_left, chosen_right = i2t.nearest // k, i2t.nearest % k
    swapped = right * k + left
    two = left != right
    values = {"left_top1": _share(chosen_left == left), "right_top1": _share(chosen_right == right)}
    protocols = {
        f"{side}_top1": Measurement(
            split, n, 1 / k, frozen, f"the {side} class in the nearest of {k * k:,} captions", "proportion"
        )
        for side in ("left", "right")
    }
    if bool(two.any()):
        cosines = [
            F.cosine_similarity(embedded.embeddings[two], texts[numbers[two]]) for numbers in (embedded.labels, swapped)
        ]
        values["swapped_top1"] = _share((i2t.nearest == swapped)[two])
        values["swapped_above"] = float((share_in_top(*places(torch.stack(cosines, dim=1), cosines[1]), 1)).mean())
        notes = {
            "swapped_top1": (1 / k**2, "left and right exchanged in the nearest caption"),
            "swapped_above": (0.5, "the caption with left and right exchanged is nearer than their own"),
        }
        protocols |= {
            name: Measurement(
                split, int(two.sum()), chance, frozen, f"of pairs of two classes: {note}", "proportion", direction="min"
            )
            for name, (chance, note) in notes.items()
        }
    counts = confusion_matrix(torch.cat([left, right]), torch.cat([chosen_left, chosen_right]), k)
    return Scores(values, protocols=protocols, figures={"pair_confusion": Confusion(counts.cpu().numpy(), classes)})


@dataclass(frozen=True)
class EmbeddedPairs:
    """Embeddings float32 `(n d)` of pairs and the numbers int64 `(n,)` of their captions."""

    embeddings: Tensor
    labels: Tensor


def check_towers(model: Any) -> None:
    """Raise `UsageError` if a model cannot compare images with texts."""
    text = getattr(model, "text", None)
    if not hasattr(text, "encode_text") or getattr(model, "backbone", None) is None:
        raise UsageError(
            f"comparing images with captions needs a model with a 'backbone' and a 'text' that offers encode_text; "
            f"{type(model).__name__} has {'no text' if text is None else 'a text of type ' + type(text).__name__}: train one "
            f"with recipes/clip_cifar100.py"
        )


def half_of(model: Any) -> Preprocessing:
    """The preprocessing of one half of a pair for a saved model; `UsageError` if it has none, or takes no pairs."""
    if not model.preprocessing:
        raise UsageError("this model was saved without preprocessing, so images cannot be prepared for it")
    pair = Preprocessing.from_json(model.preprocessing)
    channels, height, width = pair.shape
    if width % 2:
        raise UsageError(f"this model takes images of {height}×{width} pixels, which are no pairs: their width is odd")
    return replace(pair, shape=(channels, height, width // 2))


def embed_images(model: Any, images: Tensor) -> Tensor:
    """Images as the model takes them `(b c h w)` → embeddings float32 `(b d)`, not normalised."""
    count = len(images)
    if count == 0:  # this rank's share of the last batch; one image of zeros gives the number of dimensions
        images = images.new_zeros(1, *images.shape[1:])
    return _projected(model, "projector", encode_image(model.backbone, images))[:count]


def embed_texts(model: Any, texts: Sequence[str]) -> Tensor:
    """Texts → embeddings float32 `(n d)`, not normalised; `TEXTS_AT_ONCE` at a time, in the order given."""
    parts = (texts[first : first + TEXTS_AT_ONCE] for first in range(0, len(texts), TEXTS_AT_ONCE))
    return torch.cat([_projected(model, "text_projector", model.text.encode_text(list(part))) for part in parts])


def caption_embeddings(model: Any, all_captions: Sequence[str]) -> Tensor:
    """The captions' embeddings float32 `(k² d)`, on every rank: each encodes its share."""
    parts = torch.arange(len(all_captions)).tensor_split(world_size())
    share, count = parts[rank()], len(parts[rank()])
    if count == 0:  # more ranks than captions: any caption gives the number of dimensions
        share = parts[0][:1]
    if getattr(model, "captions", None) == list(all_captions):  # it may have cached its text tower's features
        embeddings = torch.cat([model.embed_captions(part).float() for part in share.split(TEXTS_AT_ONCE)])
    else:
        embeddings = embed_texts(model, [all_captions[number] for number in share.tolist()])
    return all_gather(embeddings[:count])


def _projected(model: Any, name: str, features: Tensor) -> Tensor:
    projector = getattr(model, name, None)
    return (features if projector is None else projector(features)).float()


def _embed_pairs(model: Any, pairs: Pairs, device: torch.device) -> EmbeddedPairs:
    embeddings, labels = [], []
    for batch in pairs.epoch(0, device=device, rank=rank(), world=world_size()):
        embeddings.append(all_gather(embed_images(model, batch["images"])))
        labels.append(all_gather(batch["labels"]))
    return EmbeddedPairs(torch.cat(embeddings), torch.cat(labels))


def check_embeddings(pairs: Tensor, texts: Tensor) -> None:
    """`UsageError` if pairs `(n d)` and captions `(m d)` have no common space, `VitkitError` if they are not finite."""
    if pairs.shape[1] != texts.shape[1]:
        raise UsageError(
            f"pairs are embedded in {pairs.shape[1]} dimensions, captions in {texts.shape[1]}; both projectors need "
            f"the same out_dim"
        )
    for name, embeddings in (("pairs", pairs), ("captions", texts)):
        if not bool(embeddings.isfinite().all()):
            raise VitkitError(
                f"the embeddings of {name} are not finite: the model has diverged, or its weights are damaged"
            )


def _share(hits: Tensor) -> float:
    return float(hits.cpu().double().mean())  # not every accelerator computes in fp64


def _attention(backbone: Any, images: Tensor) -> Tensor | None:
    """Maps `(b rows columns)` over both halves, the strongest part of each at 1, of a backbone that offers them."""
    attention_maps = getattr(backbone, "attention_maps", None)
    if attention_maps is None:
        return None
    try:
        maps: Tensor = attention_maps(images).float()
    except UsageError:  # no block of this backbone sees both halves
        return None
    if maps.ndim != 3:
        return None
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
