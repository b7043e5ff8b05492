"""Label retrieval: which label does a multimodal model find in an image that it sees without one?"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit import backbones, heads
from vitkit.contracts import Attention, Confusion, Embeddings, Measurement, ReportFigure, Scores
from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError
from vitkit.models import evaluating
from vitkit_eval import confusion_matrix

SHOWN = 2_000
"""Test embeddings handed to the report's map: more make its picture no clearer."""


class LabelRetrieval:
    """Retrieves each test image's label in two ways: `m1_top1`, `m1_top3`, `m2_top1`, `m2_top3`.

        M1: argmax_k sim(E(image), E(image, label k))       M2: argmax_k sim(E(image), E(label k))

    E is the model's `backbone` and, with space="projector", its `projector` behind it; sim is the cosine.
    Every image of the test split is scored against every label. Labels that are exactly equally near share
    the hit, so that a model to which all labels are one scores chance, 1/k and 3/k, rather than what the
    first label's share happens to be.

    `batch_size` counts images encoded with one label each at a time. Called under autocast it computes in
    that precision; similarities are fp32. Leaves the model's mode and the random state as they were.

    Ranks: each encodes its share of the images, and every rank returns the same scores.

    Raises `UsageError` for a model without such a backbone, another number of classes than the dataset's, an
    unknown `space` and a `batch_size` below one.

    Source: the two methods of a note on multimodal JEPA for label retrieval, which scored the first ten
    batches only.
    """

    def __init__(
        self,
        *,
        space: Literal["projector", "encoder"] = "projector",
        batch_size: int = 500,
        attention_samples: int = 10,
    ) -> None:
        if space not in ("projector", "encoder"):
            raise UsageError(f"space is {space!r}, expected 'projector' or 'encoder'")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, expected at least 1 image")
        if attention_samples < 0:
            raise UsageError(f"attention_samples is {attention_samples}, expected at least 0")
        self.space, self.batch_size, self.attention_samples = space, batch_size, attention_samples

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = torch.nn.Module()
        model.backbone = backbones.build(
            "multimodal_vit", num_classes=3, img_size=8, embed_dim=16, depth=1, num_heads=1, dropout=0.1
        )
        model.projector = heads.build("mlp", in_dim=16, out_dim=8, norm="batch")
        return {}, {"model": model}

    def __call__(self, model: Any, dataset: Any) -> Scores:
        backbone: Any = getattr(model, "backbone", None)
        if not hasattr(backbone, "encode_multimodal"):
            raise UsageError(
                f"label retrieval needs a model whose .backbone takes labels, such as 'multimodal_vit'; "
                f"given {type(model).__name__} with backbone {type(backbone).__name__}"
            )
        classes: list[str] = dataset.classes
        if backbone.num_classes != len(classes):
            raise UsageError(
                f"the model knows {backbone.num_classes} labels, {dataset.name} has {len(classes)} classes; "
                f"evaluate it on the dataset it was trained on"
            )
        if len(dataset.test) == 0:
            raise UsageError("the split to evaluate on holds no images")
        with evaluating(model) as device:
            found = [
                [all_gather(part) for part in self._score(model, batch)]
                for batch in dataset.test.batches(self.batch_size).epoch(
                    0, device=device, rank=rank(), world=world_size()
                )
            ]
            m1, m2, features, labels = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
            methods = {"m1": m1, "m2": m2}
            figures: dict[str, ReportFigure] = {
                "embeddings": Embeddings(features[:SHOWN].numpy(), labels[:SHOWN].numpy(), classes)
            }
            for name, scores in methods.items():
                counts = confusion_matrix(labels, scores.argmax(1), len(classes))
                figures[f"{name}_confusion"] = Confusion(counts.numpy(), classes)
            if self.attention_samples:
                figures["label_attention"] = self._attention(backbone, dataset, device)
        return Scores(
            {f"{name}_top{k}": topk(scores, labels, k) for name, scores in methods.items() for k in (1, 3)},
            protocols={
                f"{name}_top{k}": Measurement(
                    split="test",
                    samples=len(labels),
                    chance=min(k / len(classes), 1.0),
                    frozen="encoder and projector" if self.space == "projector" else "encoder",
                    note=f"image against {other}, cosine in the {self.space}'s space",
                )
                for name, other in (("m1", "the image with each label"), ("m2", "each label alone"))
                for k in (1, 3)
            },
            figures=figures,
        )

    def _score(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """M1's and M2's similarities `(b c)`, the images' features `(b d)`, and their labels."""
        backbone, images = model.backbone, batch["images"]
        project = model.projector if self.space == "projector" else torch.nn.Identity()
        all_labels = torch.arange(backbone.num_classes, device=images.device)
        features = backbone.encode_image(images)
        alone = project(features).float()
        # One at a time: rows of one matrix product may differ in their last bit, and labels that are one must tie.
        labels = torch.cat([project(backbone.encode_label(label[None])).float() for label in all_labels])
        m2 = F.cosine_similarity(alone[:, None], labels[None], dim=-1)
        # One label after another: a batch is as large as without labels, and stays in the processor's cache.
        with_label = [
            project(backbone.encode_multimodal(images, label.expand(len(images)))).float()
            for label in all_labels
        ]
        m1 = torch.stack([F.cosine_similarity(alone, z, dim=-1) for z in with_label], dim=1)
        return m1, m2, features.float(), batch["labels"]

    def _attention(self, backbone: Any, dataset: Any, device: torch.device) -> Attention:
        """How much the label's token attends to each patch, for one test image of each class in turn."""
        split = dataset.test.stratified_subset(self.attention_samples)
        batch = next(iter(split.batches(len(split)).epoch(0, device=device)))
        maps = backbone.label_attention(batch["images"], batch["labels"]).float()  # (n h w)
        scale = maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        mean, std = (torch.tensor(m, device=device)[:, None, None] for m in (dataset.mean, dataset.std))
        return Attention(
            (batch["images"] * std + mean).clamp(0, 1).cpu().numpy(),
            (maps / scale).cpu().numpy(),
            [f"label {dataset.classes[int(label)]}" for label in batch["labels"]],
        )


def topk(scores: Tensor, labels: Tensor, k: int) -> float:
    """The share of samples whose label is among the `k` highest of scores `(n c)`, ties sharing their places."""
    own = scores.gather(1, labels[:, None])
    higher, equal = (scores > own).sum(1), (scores == own).sum(1)
    return float(((k - higher) / equal).cpu().double().clamp(0, 1).mean())  # not every accelerator computes in fp64
