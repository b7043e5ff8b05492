"""Whether attention finds the object: its mass within the box of an object that is placed on a plain and on a cluttered ground."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vitkit import backbones
from vitkit.contracts import Attention, Measurement, Scores, SplitName
from vitkit.models import attention, evaluating
from vitkit.seeding import derive_seed
from vitkit.validation import at_least, in_range
from vitkit_eval.features import named, split_of

BATCH = 64
GROUNDS: tuple[Literal["plain", "clutter"], ...] = ("plain", "clutter")
SHOWN = 8
EVEN = 3.0
"""In the figure attention to a patch is bright from this many times the mean on."""


class ObjectAttention:
    """The share of the last block's attention that lies within the box of an object: `object_attention_plain`, `object_attention_clutter`.

        mass = mean_i [ Σ_p a_ip·c_ip / Σ_p a_ip ]

    An image of the split, reduced to `scale` of the side of the model's images, is the object; its place is drawn. a_ip is the attention
    of the CLS token to patch p, the mean over heads (without a CLS token: the mean over all patches as queries); c_ip is the share of the
    patch that lies within the box. Even attention has the mass of the box's area, scale², which is the chance level. The ground is one
    colour, or a smooth field of random colours that differ more than an object's usually do. `images` of the split take part, chosen by
    `seed`, which also draws places and grounds. Labels are not used. The figure `object_attention` shows the first ones.

    The object fills its box, so a mass far above chance shows that attention prefers the object to the ground. It does not show that it
    follows the outline of the object.

    Ranks: each rank computes all images, without waiting for others. Raises `UsageError` for a model without attention between all tokens
    in its last block, for a `scale` outside (0, 1) and for an empty split.
    """

    name = "object_attention"

    def __init__(self, *, images: int = 256, scale: float = 0.5, seed: int = 0) -> None:
        at_least(1, images=images)
        in_range(0, 1, low_included=False, high_included=False, scale=scale)
        self.images, self.scale, self.seed = images, scale, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        model = nn.Module()
        model.backbone = backbones.build("vitkit:vit", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=1)
        return {}, {"model": model}

    def check(self, dataset: Any, split: SplitName = "test") -> None:
        """Raise `UsageError` for an empty split."""
        split_of(dataset, split)

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        chosen = split_of(dataset, split).stratified_subset(self.images, seed=self.seed).in_memory()
        pixels = chosen.preprocessing.pixels(chosen.images)
        backbone = getattr(model, "backbone", model)
        values: dict[str, float] = {}
        pictures, maps, captions = [], [], []
        area = 0.0
        for ground in GROUNDS:
            generator = Generator().manual_seed(derive_seed(self.seed, "object", GROUNDS.index(ground)))
            composed, boxes = compose(pixels, ground, scale=self.scale, generator=generator)
            area = float(boxes.mean())
            masses = []
            with evaluating(model) as device:
                for images, box in zip(composed.split(BATCH), boxes.split(BATCH), strict=True):
                    weights = attention(backbone, chosen.preprocessing.normalise(images.clone()).to(device)).head_maps().mean(dim=1).cpu()
                    covered = F.adaptive_avg_pool2d(box[:, None], (weights.shape[1], weights.shape[2]))[:, 0]
                    masses.append((weights * covered).sum(dim=(1, 2)) / weights.sum(dim=(1, 2)).clamp(min=1e-12))
                    if not masses[1:]:
                        pictures.append(images[:SHOWN])
                        maps.append(weights[:SHOWN] / torch.maximum(weights.amax((1, 2)), EVEN * weights.mean((1, 2)))[:SHOWN, None, None])
                        captions += [f"{ground}: {mass:.0%} inside" for mass in masses[0][:SHOWN].tolist()]
            values[f"object_attention_{ground}"] = float(torch.cat(masses).mean())
        note = f"mass within the box of an object of {self.scale:g} of the side, last block, mean over heads"
        figure = Attention(torch.cat(pictures).numpy(), torch.cat(maps).clamp(0, 1).numpy(), captions)
        return named(
            Scores(
                values,
                protocols={name: Measurement(split, len(chosen), chance=area, frozen="encoder", note=note) for name in values},
                figures={self.name: figure},
            ),
            split,
        )


def compose(
    pixels: Tensor, ground: Literal["plain", "clutter"], *, scale: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Objects `(n c h w)` in [0, 1] on grounds of the same size `(n c h w)`, and masks of their boxes `(n h w)` of zeros and ones."""
    count, channels, height, width = pixels.shape
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    small = F.interpolate(pixels, size=(tall, wide), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    if ground == "plain":
        images = torch.rand(count, channels, 1, 1, generator=generator).repeat(1, 1, height, width)
    else:
        spots = torch.rand(count, channels, 6, 6, generator=generator)
        images = F.interpolate(spots, size=(height, width), mode="bilinear", align_corners=False)
    masks = torch.zeros(count, height, width)
    tops = torch.randint(height - tall + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(width - wide + 1, (count,), generator=generator).tolist()
    for number, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        images[number, :, top : top + tall, left : left + wide] = small[number]
        masks[number, top : top + tall, left : left + wide] = 1.0
    return images, masks


__all__ = ["ObjectAttention", "compose"]
