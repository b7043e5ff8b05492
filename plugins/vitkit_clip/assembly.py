"""The model of the CLIP recipe, built for a dataset, and the augmentations of the recipe."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from vitkit import backbones, heads, losses
from vitkit.errors import UsageError, VitkitError
from vitkit.registry import Component
from vitkit.transforms import ColorJitter, Compose, CutMix, HorizontalFlip, MixUp, RandAugment, RandomAffine, RandomCrop
from vitkit_clip.clip import CLIP
from vitkit_clip.pairs import captions
from vitkit_clip.text import vocabulary_of

AUGMENTS = {
    "none": None,
    "reference": Compose([HorizontalFlip(), RandomAffine(degrees=10), ColorJitter(0.2, 0.2, 0.2)]),
    "crop": Compose([RandomCrop(4), HorizontalFlip()]),
    "shift": RandomAffine(degrees=10, translate=0.1, scale=(0.9, 1.1)),
    "rand": Compose([RandomCrop(4), HorizontalFlip(), RandAugment()]),
}
"""Transforms of the halves of pairs by name; "reference" is that of the reference document."""
MIXES = {"none": None, "mixup": MixUp(0.8, same_class=True), "cutmix": CutMix(1.0, same_class=True)}
"""Mixings of halves of one class by name."""
PAIR_VIT = ("pair_vit", "vitkit:pair_vit")
TEXT = {"embed_dim": 128, "depth": 1, "num_heads": 2}
"""The default size of the text tower `text_transformer`."""


def build_clip(
    data: Any,
    *,
    tower: Literal["baseline", "enhanced", "best", "small"],
    backbone: Component | None = None,
    text: Component,
    loss: Component,
    proj_dim: int,
    classify: float,
    label_smoothing: float,
    freeze_text: bool = False,
    caption_positives: bool = True,
    say: Callable[[str], Any] = lambda line: None,
) -> CLIP:
    """A `CLIP` for pairs of a dataset's images; `say` gets a line that names its text tower.

    The image tower is `pair_vit` with the preset `tower`, or
    `pair_backbone` around another `backbone`. The text tower `auto` is `openclip_text` if it is available, else
    `text_transformer`. Both projectors are `linear` heads to `proj_dim` dimensions. With `classify` > 0 the loss is
    `pair_multi_task`, which also classifies both halves with that weight. Raises `UsageError` if the text tower has no
    `encode_text`; other errors are those of the registries.
    """
    all_captions = captions(data.classes)
    channels, height, width = data.shape
    size = height if height == width else [height, width]
    image = _image_tower(backbone, img_size=size, in_chans=channels, preset=tower)
    words = _text_tower(text, vocabulary_of(all_captions), say)
    if not hasattr(words, "encode_text"):
        raise UsageError(f"--text {text.name}: that backbone has no encode_text; take text_transformer or another text tower")
    if freeze_text:
        words.requires_grad_(False)
    frozen = not any(parameter.requires_grad for parameter in words.parameters())
    say(f"text encoder: {words.spec.name}, {'frozen' if frozen else 'trained'}")
    projector = heads.build("vitkit:linear", in_dim=image.embed_dim, out_dim=proj_dim)
    text_projector = heads.build("vitkit:linear", in_dim=words.embed_dim, out_dim=proj_dim)
    classifier = heads.build("vitkit:linear", in_dim=image.embed_dim, out_dim=len(data.classes)) if classify else None
    objective: nn.Module = loss.build()
    if classify:
        arguments = {"contrastive": loss.name, "arguments": loss.kwargs}
        objective = losses.build("vitkit:pair_multi_task", weight=classify, label_smoothing=label_smoothing, **arguments)
    return CLIP(
        image, words, projector, text_projector, objective, all_captions, classifier, caption_positives=caption_positives
    )


def _image_tower(backbone: Component | None, *, preset: str, **images: Any) -> Any:
    if backbone is None or backbone.name in PAIR_VIT:
        return backbones.build("vitkit:pair_vit", **images, **{"preset": preset, **(backbone.kwargs if backbone else {})})
    if hasattr(backbones.get(backbone.name), "encode_halves"):
        return backbone.build(**images)
    return backbones.build("vitkit:pair_backbone", backbone=backbone.name, backbone_args=backbone.kwargs, **images)


def _text_tower(text: Component, vocabulary: list[str], say: Callable[[str], Any]) -> Any:
    if text.name in ("text_transformer", "vitkit:text_transformer"):
        return text.build(vocabulary=vocabulary, **TEXT)
    if text.name != "auto":
        return text.build()
    try:
        return backbones.build("openclip_text", **text.kwargs)
    except VitkitError as error:
        say(f"{error}; text_transformer, trained from scratch, replaces it")
        return backbones.build("vitkit:text_transformer", vocabulary=vocabulary, **TEXT)
