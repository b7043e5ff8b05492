"""Label retrieval: a multimodal model finds the label of an image that it gets without a label."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit import backbones, heads
from vitkit.contracts import Attention, Confusion, Embeddings, Measurement, ReportFigure, Scores, SplitName
from vitkit.distributed import all_gather, rank, world_size
from vitkit.errors import UsageError
from vitkit.models import evaluating
from vitkit.validation import at_least, one_of
from vitkit_eval import check_labels, confusion_matrix, model_classes, named, split_of, topk_accuracy

EMBEDDINGS_SHOWN = 2_000
"""Most embeddings in the report's map: more points do not make it clearer."""
TOPS = (1, 3)


class LabelRetrieval:
    """Retrieves each image's label in two ways: `m1_top1`, `m1_top3`, `m2_top1`, `m2_top3`.

        M1: argmax_k sim(E(image), E(image, label k))       M2: argmax_k sim(E(image), E(label k))

    E is the model's `backbone`, followed by its `projector` with space="projector"; sim is the cosine. Every image of the
    split is compared with every label. Labels with equal similarities share their places: a model for which all labels are
    equal gets the chance scores 1/k and 3/k. If the model has names of classes, they are matched with the dataset's by
    name.

    `batch_size` is the number of images that are encoded at a time, each with one label. Under autocast the model computes
    in the precision of autocast; similarities are fp32. The mode of the model and the random state do not change.

    Ranks: each rank encodes its share of the images, and all ranks return the same scores.

    Raises `UsageError` if the model has no such backbone or other classes than the dataset, if an image has no label, if
    `space` is unknown, or if `batch_size` is below 1.

    Source: the two methods of the reference document on multimodal JEPA. The document scores only the first ten batches.
    """

    name = "label_retrieval"

    def __init__(
        self,
        *,
        space: Literal["projector", "encoder"] = "projector",
        batch_size: int = 500,
        attention_samples: int = 10,
    ) -> None:
        one_of(("projector", "encoder"), space=space)
        at_least(1, batch_size=batch_size)
        at_least(0, attention_samples=attention_samples)
        self.space, self.batch_size, self.attention_samples = space, batch_size, attention_samples

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = torch.nn.Module()
        model.backbone = backbones.build(
            "vitkit:multimodal_vit", num_classes=3, img_size=8, embed_dim=16, depth=1, num_heads=1, dropout=0.1
        )
        model.projector = heads.build("vitkit:mlp", in_dim=16, out_dim=8, norm="batch")
        return {}, {"model": model}

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` if an image of this split has no label."""
        check_labels(self.name, dataset, split)

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        backbone: Any = getattr(model, "backbone", None)
        if not hasattr(backbone, "encode_multimodal"):
            raise UsageError(
                f"label retrieval needs a model whose .backbone takes labels, such as 'multimodal_vit'; "
                f"given {type(model).__name__} with backbone {type(backbone).__name__}"
            )
        classes: list[str] = dataset.classes
        if backbone.num_classes != len(classes):
            raise UsageError(
                f"the model has {backbone.num_classes} labels, and {dataset.name} has {len(classes)} classes; "
                f"evaluate it on the dataset that it was trained on"
            )
        self.check(dataset, split)
        columns, images = model_classes(model, dataset), split_of(dataset, split)
        with evaluating(model) as device:
            batches = images.batches(self.batch_size).epoch(0, device=device, rank=rank(), world=world_size())
            parts = [[all_gather(part) for part in self._compare(model, batch)] for batch in batches]
            m1, m2, features, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
            methods = {"m1": m1[:, columns], "m2": m2[:, columns]}
            figures: dict[str, ReportFigure] = {
                "embeddings": Embeddings(features[:EMBEDDINGS_SHOWN].numpy(), labels[:EMBEDDINGS_SHOWN].numpy(), classes)
            }
            for name, scores in methods.items():
                counts = confusion_matrix(labels, scores.argmax(1), len(classes))
                figures[f"{name}_confusion"] = Confusion(counts.numpy(), classes)
            if self.attention_samples:
                figures["label_attention"] = self._attention(backbone, dataset, images, torch.tensor(columns, device=device))
        compared = {"m1": "the image with each label", "m2": "each label alone"}
        retrieved = Scores(
            {f"{name}_top{k}": topk_accuracy(scores, labels, k) for name, scores in methods.items() for k in TOPS},
            protocols={
                f"{name}_top{k}": Measurement(
                    split,
                    len(labels),
                    chance=min(k / len(classes), 1.0),
                    frozen="encoder and projector" if self.space == "projector" else "encoder",
                    note=f"image against {compared[name]}, cosine in the {self.space}'s space",
                    kind="proportion",
                )
                for name in methods
                for k in TOPS
            },
            figures=figures,
        )
        return named(retrieved, split)

    def _compare(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """M1's and M2's similarities `(b c)`, the images' features `(b d)`, and their labels."""
        backbone, images = model.backbone, batch["images"]
        project = model.projector if self.space == "projector" else torch.nn.Identity()
        all_labels = torch.arange(backbone.num_classes, device=images.device)
        features = backbone.encode_image(images)
        alone = project(features).float()
        # One label at a time: rows of one matrix product may differ in their last bit, and equal labels must have equal scores.
        labels = torch.cat([project(backbone.encode_label(label[None])).float() for label in all_labels])
        m2 = F.cosine_similarity(alone[:, None], labels[None], dim=-1)
        # One label at a time: the batch stays as small as without labels, and fits into the processor's cache.
        with_label = [
            project(backbone.encode_multimodal(images, label.expand(len(images)))).float()
            for label in all_labels
        ]
        m1 = torch.stack([F.cosine_similarity(alone, z, dim=-1) for z in with_label], dim=1)
        return m1, m2, features.float(), batch["labels"]

    def _attention(self, backbone: Any, dataset: Any, images: Any, columns: Tensor) -> Attention:
        """The attention of the label's token to each patch, for one image of each class in turn."""
        chosen = images.stratified_subset(self.attention_samples)
        batch = next(iter(chosen.batches(len(chosen)).epoch(0, device=columns.device)))
        maps = backbone.label_attention(batch["images"], columns[batch["labels"]]).float()  # (n h w)
        scale = maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        mean, std = (torch.tensor(m, device=columns.device)[:, None, None] for m in (dataset.mean, dataset.std))
        return Attention(
            (batch["images"] * std + mean).clamp(0, 1).cpu().numpy(),
            (maps / scale).cpu().numpy(),
            [f"label {dataset.classes[int(label)]}" for label in batch["labels"]],
        )
